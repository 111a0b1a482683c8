"""Machines as their vendors' tools describe them: recordings, written down after the vendors' documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from sagellm_common.comm_backend.hardware.host import ToolRun

RECORDINGS = Path(__file__).parent / "recordings"
GIB, MIB = 1 << 30, 1 << 20


def recorded(name: str) -> str:
    return (RECORDINGS / name).read_text()


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in Path(path).parents]


@dataclass
class RecordedHost:
    """`tools` are command lines, or their beginnings, and what they print; a ToolRun for one that fails."""

    tools: Mapping[str, str | ToolRun] = field(default_factory=dict)
    paths: Sequence[str] = ()
    packages: Sequence[str] = ()
    torch: str = "cpu"
    files: Mapping[str, str] = field(default_factory=dict)

    def run(self, *argv: str) -> ToolRun | None:
        line = " ".join(argv)
        said = [printed for known, printed in self.tools.items() if line.startswith(known)]
        if not said:
            return None
        return said[0] if isinstance(said[0], ToolRun) else ToolRun(said[0])

    def nodes(self, pattern: str) -> Sequence[str]:
        known = {*self.paths, *self.files, *(parent for path in self.files for parent in _parents(path))}
        return sorted(path for path in known if fnmatch(path, pattern) and path.count("/") == pattern.count("/"))

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def link(self, path: str) -> str:
        return self.files.get(path, "")

    def has_package(self, name: str) -> bool:
        return name in self.packages

    def torch_build(self) -> str:
        return self.torch

    def memory_bytes(self) -> tuple[int, int]:
        return 64 * GIB, 48 * GIB


NVIDIA = RecordedHost(
    {
        "nvidia-smi --query-gpu=index": recorded("nvidia-smi.h200.txt"),
        "nvidia-smi --query-gpu=compute_cap": "9.0\n9.0\n",
    },
    ["/dev/nvidia0", "/dev/nvidia1"],
    ["triton"],
    "cuda",
)
ASCEND = RecordedHost({"npu-smi info": recorded("npu-smi.910b3.txt")}, ["/dev/davinci0"], ["torch_npu", "dlinfer"])
CAMBRICON = RecordedHost({"cnmon": recorded("cnmon.mlu370.txt")}, ["/dev/cambricon_dev0"], ["torch_mlu", "dlinfer"])
HYGON = RecordedHost({"hy-smi --show": recorded("hy-smi.k100.txt")}, ["/dev/mkfd"], [], "hip")
KUNLUN = RecordedHost(
    {"xpu-smi -m": recorded("xpu-smi.p800.txt"), "xpu-smi -q": recorded("xpu-smi-q.p800.txt")}, ["/dev/xpu0"]
)
