"""Which library is for which CPU, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sagellm_common.core import cxx
from sagellm_common.core.errors import ConfigError
from sagellm_common.engines.lmdeploy.kernels import build


@pytest.mark.parametrize(
    ("flags", "isas"),
    [
        (build.CPU_FLAGS["avx512_vnni"], ["avx512_vnni", "avx2"]),
        (build.CPU_FLAGS["avx512_vnni"] - {"avx512_vnni"}, ["avx2"]),
        (build.CPU_FLAGS["avx2"] - {"fma"}, []),
        (frozenset(), []),
    ],
)
def test_a_library_needs_all_its_cpu_flags(flags: frozenset[str], isas: list[str]) -> None:
    assert build.supported_isas(flags) == isas


def test_cpu_flags_are_those_of_the_kernel(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t: none\n"
    )
    assert build.cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}
    assert build.cpu_flags(tmp_path / "missing") == frozenset()
    cpuinfo.write_text("Processor\t: ARMv8\n")
    assert build.cpu_flags(cpuinfo) == frozenset()


def test_other_sources_or_flags_are_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.library_path("avx2")
    assert before != build.library_path("avx512_vnni")
    for source in build.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.library_path("avx2") == before
    (tmp_path / "vec.h").write_text("// changed\n")
    assert build.library_path("avx2") != before


def test_a_compiler_error_is_shown_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if cxx.compiler() is None:
        pytest.skip("no C++ compiler; install g++")
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return undeclared; }\n")
    monkeypatch.setattr(build, "MAIN", broken)
    monkeypatch.setenv("SAGELLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="undeclared"):
        build.build("avx2")
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


def test_no_compiler_is_an_error_that_setup_may_ignore(tmp_path: Path) -> None:
    for arguments, code in (([], 1), (["--optional"], 0)):
        done = subprocess.run(
            [sys.executable, "-m", build.__name__, *arguments],
            env={"PATH": str(tmp_path), "SAGELLM_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code
        assert "torch computes instead" in done.stderr
