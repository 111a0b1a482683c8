"""Compiles the kernels, one library per instruction set, into the cache directory. Needs a C++17 compiler, no network.

    python -m sagellm_common.engines.lmdeploy.kernels.build [--optional]

A library is named after the hash of its sources and flags: what is there is up to date.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import xxhash

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.paths import cache_home

SOURCES = Path(__file__).parent / "csrc"
MAIN = SOURCES / "sagellm_cpu.cpp"
COMPILE_TIMEOUT_S = 300.0

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
    digest = xxhash.xxh3_128(" ".join(FLAGS + ISA_FLAGS[isa]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return cache_home() / "kernels" / f"{isa}-{digest.hexdigest()[:16]}.so"


def compiler() -> str | None:
    """$CXX, or the first of the usual names that is installed."""
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )


def build(isa: str) -> Path:
    """The library for `isa`, compiled unless it is there. Raises ConfigError with the compiler's words."""
    target = library_path(isa)
    if target.is_file():
        return target
    cxx = compiler()
    if cxx is None:
        raise ConfigError("no C++ compiler found (c++, g++, clang++); install g++ or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        try:
            done = subprocess.run(
                [cxx, *FLAGS, *ISA_FLAGS[isa], str(MAIN), "-o", str(output)],
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{cxx} did not finish {MAIN.name} for {isa} within {COMPILE_TIMEOUT_S:.0f} s") from None
        if done.returncode:
            raise ConfigError(f"{cxx} cannot compile {MAIN.name} for {isa}:\n{done.stderr[-2000:]}")
        output.replace(target)  # whole or not at all: another process may be building, too
    return target


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
