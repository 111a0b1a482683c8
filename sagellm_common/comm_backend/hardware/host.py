"""The machine as a probe sees it; the tests have recorded ones."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TOOL_TIMEOUT_S = 10.0
"""Tools of a healthy machine answer within one or two; those of a broken one may never."""


@dataclass(frozen=True, slots=True)
class ToolRun:
    """What came of calling a tool. `problem` is empty when it ended with exit code 0, else says what happened."""

    stdout: str = ""
    problem: str = ""


class Host(Protocol):
    def run(self, *argv: str) -> ToolRun | None:
        """None when there is no such tool. Does not raise for one that fails."""

    def nodes(self, pattern: str) -> Sequence[str]:
        """Paths that match a glob pattern."""

    def read(self, path: str) -> str | None:
        """The text of a small file, such as those below /sys; None when it cannot be read."""

    def link(self, path: str) -> str:
        """Where a symbolic link points; empty when it cannot be read."""

    def has_package(self, name: str) -> bool:
        """Whether Python could import it."""

    def torch_build(self) -> str:
        """What the installed torch is built for: `cuda`, `hip`, `cpu`, or empty without torch."""

    def memory_bytes(self) -> tuple[int, int]:
        """(total, available) of the host."""


class LocalHost:
    """This machine."""

    def run(self, *argv: str) -> ToolRun | None:
        if shutil.which(argv[0]) is None:
            return None
        environment = os.environ | {"LC_ALL": "C"}
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TOOL_TIMEOUT_S,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return ToolRun(problem=f"{argv[0]} did not answer within {TOOL_TIMEOUT_S:g} s")
        except OSError as error:
            return ToolRun(problem=f"{argv[0]} could not be run: {error.strerror}")
        if done.returncode:
            said = next(iter((done.stderr + done.stdout).split("\n")), "").strip()
            return ToolRun(
                done.stdout, f"{argv[0]} failed with exit code {done.returncode}: {said or 'it said nothing'}"
            )
        return ToolRun(done.stdout)

    def nodes(self, pattern: str) -> Sequence[str]:
        return sorted(glob.glob(pattern))

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(errors="replace")
        except OSError:  # for /sys an ordinary answer: the speed of a link that is down
            return None

    def link(self, path: str) -> str:
        try:
            return os.readlink(path)
        except OSError:
            return ""

    def has_package(self, name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    def torch_build(self) -> str:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return ""
        version = (Path(spec.origin).parent / "version.py").read_text()
        # `cuda: Optional[str] = '13.0'`, and None for what it is not built for.
        built = re.findall(r"^(cuda|hip)\b[^=]*= *['\"]", version, re.MULTILINE)
        return built[0] if built else "cpu"

    def memory_bytes(self) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
