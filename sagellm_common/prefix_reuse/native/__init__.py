"""`prefix_index.cpp` through ctypes: chained block hashes, and the table of who holds which block.

python -m sagellm_common.prefix_reuse.native [--optional]      compiles it, `make setup` does
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_int, c_int64, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from sagellm_common.core import cxx

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "prefix_index.cpp"
SOURCES = (SOURCE, *(Path(__file__).parent / name for name in ("holder_sets.h", "xxh3_128.h")))
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra")

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sage_index_usable": (c_int, ()),
    "sage_chain": (None, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "sage_index_new": (c_void_p, (c_uint64,)),
    "sage_index_free": (None, (c_void_p,)),
    "sage_index_open": (c_int64, (c_void_p,)),
    "sage_index_close": (c_int64, (c_void_p, c_uint32)),
    "sage_index_insert": (c_int64, (c_void_p, c_uint16, c_void_p, c_int64)),
    "sage_index_remove": (c_int64, (c_void_p, c_uint16, c_void_p, c_int64)),
    "sage_index_match": (c_int64, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64)),
    "sage_index_held": (c_int64, (c_void_p, c_uint16)),
    "sage_index_metrics": (None, (c_void_p, c_void_p)),
}


def library_path() -> Path:
    """Where it is, built or not."""
    return cxx.library_path("prefix_index", SOURCES, FLAGS)


def build() -> Path:
    """Raises ConfigError with the compiler's words."""
    return cxx.compile_library(SOURCE, FLAGS, library_path())


@functools.cache
def library() -> Any | None:
    """None, with a line in the log, where it was not built. Calls release the GIL."""
    path = library_path()
    if not path.is_file():
        log.warning("block hashes and the prefix index are Python's, slower: `python -m %s` compiles them", __name__)
        return None
    found = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = restype, argtypes
    if not found.sage_index_usable():
        log.warning("block hashes and the prefix index are Python's, slower: this is no little-endian machine")
        return None
    return found
