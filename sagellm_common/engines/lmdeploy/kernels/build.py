"""Compiles the kernels, one library per instruction set, into the cache directory. Needs a C++17 compiler, no network.

python -m sagellm_common.engines.lmdeploy.kernels.build [--optional]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sagellm_common.core import cxx
from sagellm_common.core.errors import ConfigError

SOURCES = Path(__file__).parent / "csrc"
MAIN = SOURCES / "sagellm_cpu.cpp"

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"),
    "-ffp-contract=off",  # or the bits would depend on what the compiler fuses
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc 12 warns of its own intrinsics
)
BASELINE = ("-mavx2", "-mfma", "-mf16c")
ISA_FLAGS = {
    "avx512_vnni": (*BASELINE, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    "avx2": BASELINE,
}
"""Best first."""

CPU_FLAGS = {
    "avx512_vnni": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What CPUID says and the kernel allows; empty where there is no such file (not Linux) or no x86."""
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def supported_isas(flags: frozenset[str] | None = None) -> list[str]:
    """Instruction sets this CPU can run, best first."""
    found = cpu_flags() if flags is None else flags
    return [isa for isa in ISA_FLAGS if found >= CPU_FLAGS[isa]]


def library_path(isa: str) -> Path:
    """Where the library of these very sources is, built or not."""
    return cxx.library_path(isa, SOURCES.iterdir(), FLAGS + ISA_FLAGS[isa])


def build(isa: str) -> Path:
    """The library for `isa`, compiled unless it is there. Raises ConfigError with the compiler's words."""
    return cxx.compile_library(MAIN, FLAGS + ISA_FLAGS[isa], library_path(isa))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optional", action="store_true", help="exit code 0 when it cannot be built")
    args = parser.parse_args()
    isas = supported_isas()
    try:
        if not isas:
            raise ConfigError("this CPU has neither AVX-512 with VNNI nor AVX2 with FMA and F16C")
        for isa in isas:
            print(f"{isa}: {build(isa)}", flush=True)
    except ConfigError as error:
        print(f"CPU kernels were not built, torch computes instead: {error.message}", file=sys.stderr)
        raise SystemExit(0 if args.optional else 1) from None


if __name__ == "__main__":
    main()
