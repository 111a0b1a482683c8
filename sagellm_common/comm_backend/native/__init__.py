"""`pieces.cpp` through ctypes: copies and digests without the GIL. `comm_backend.pieces` says what it does.

python -m sagellm_common.comm_backend.native [--optional]      compiles it, `make setup` does
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm_common.core import cxx

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "pieces.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc 12 warns of its own intrinsics
)


def library_path() -> Path:
    """Where it is, built or not."""
    return cxx.library_path("pieces", [SOURCE], FLAGS)


def build() -> Path:
    """Raises ConfigError with the compiler's words."""
    return cxx.compile_library(SOURCE, FLAGS, library_path())


@dataclass(frozen=True, slots=True)
class Library:
    sage_pieces: Any
    """See `pieces.cpp`; its last argument is one of `isas`."""
    isas: range


@functools.cache
def library() -> Library | None:
    """None, with a line in the log, where it was not built."""
    path = library_path()
    if not path.is_file():
        log.warning("KV copies and digests are done in Python, slower: run `python -m %s` to compile them", __name__)
        return None
    found = ctypes.CDLL(str(path))
    found.sage_pieces_isas.restype, found.sage_pieces_isas.argtypes = c_int, ()
    found.sage_pieces.restype, found.sage_pieces.argtypes = None, (*(c_void_p,) * 5, c_int64, c_void_p, c_int)
    isas = range(found.sage_pieces_isas())
    if not isas:
        log.warning("KV copies and digests are done in Python, slower: this is no little-endian machine")
        return None
    return Library(found.sage_pieces, isas)
