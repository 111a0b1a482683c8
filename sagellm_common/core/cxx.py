"""C++ made into shared libraries, in the cache directory. Needs a C++17 compiler, no network.

A library is named after the hash of its sources and flags: what is there is up to date.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.paths import cache_home

COMPILE_TIMEOUT_S = 300.0


def compiler() -> str | None:
    """$CXX, or the first of the usual names that is installed."""
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )


def library_path(name: str, sources: Iterable[Path], flags: Sequence[str]) -> Path:
    """Where the library of these very sources is, built or not."""
    digest = xxhash.xxh3_128(" ".join(flags).encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    return cache_home() / "kernels" / f"{name}-{digest.hexdigest()[:16]}.so"


def compile_library(main: Path, flags: Sequence[str], target: Path) -> Path:
    """`main` compiled to `target`, unless it is there. Raises ConfigError with the compiler's words."""
    if target.is_file():
        return target
    cxx = compiler()
    if cxx is None:
        raise ConfigError("no C++ compiler found (c++, g++, clang++); install g++ or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [cxx, *flags, str(main), "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"{cxx} did not finish {main.name} for {target.stem} within {COMPILE_TIMEOUT_S:.0f} s"
            ) from None
        if done.returncode:
            raise ConfigError(f"{cxx} cannot compile {main.name} for {target.stem}:\n{done.stderr[-2000:]}")
        output.replace(target)  # whole or not at all: another process may be building, too
    return target
