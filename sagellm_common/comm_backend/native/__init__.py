"""`pieces.cpp` through ctypes: copies, digests and sockets without the GIL. `pieces` and `wire` use it.

python -m sagellm_common.comm_backend.native [--optional]      compiles it, `make setup` does
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm_common.core import cxx

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "pieces.cpp"
HEADERS = tuple(SOURCE.with_name(name) for name in ("pieces.h", "stream.h", "xxh3.h"))
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc 12 warns of its own intrinsics
)


def library_path() -> Path:
    """Where it is, built or not."""
    return cxx.library_path("pieces", [SOURCE, *HEADERS], FLAGS)


def build() -> Path:
    """Raises ConfigError with the compiler's words."""
    return cxx.compile_library(SOURCE, FLAGS, library_path())


MESSAGE = struct.Struct("@PqPPPqPPqPdddii")
"""`SageMessage`: head, its bytes; base, offsets, sizes, their number; parts; tail, its bytes; digests; silence_s,
deadline_s, digest_s; socket, isa."""
MESSAGE_DIGEST_S = struct.calcsize("@PqPPPqPPqPdd")
CLOSED, TOO_SHORT, NOT_YET = -1, -2, -3
"""What `sage_stream` and `sage_answer` return beside an errno."""


@dataclass(frozen=True, slots=True)
class Library:
    """See `pieces.cpp`; `isa` is one of `isas`."""

    sage_pieces: Any
    sage_stream: Any
    sage_answer: Any
    sage_has_soon: Any
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
    found.sage_pieces.restype = c_bool
    found.sage_pieces.argtypes = (*(c_void_p,) * 5, c_int64, c_void_p, c_void_p, c_int)
    found.sage_stream.restype, found.sage_stream.argtypes = c_int, (c_void_p, c_int)
    found.sage_answer.restype, found.sage_answer.argtypes = c_int, (c_void_p, c_double)
    found.sage_has_soon.restype, found.sage_has_soon.argtypes = c_int, (c_int, c_int64, c_double)
    isas = range(found.sage_pieces_isas())
    if not isas:
        log.warning("KV copies and digests are done in Python, slower: this is no little-endian machine")
        return None
    return Library(found.sage_pieces, found.sage_stream, found.sage_answer, found.sage_has_soon, isas)
