"""Memory that other processes of this host can map, if they are handed its file: an unnamed one that lives in memory.

Nothing is left behind when the last process that has it mapped or open is gone, however it went.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass

NAME = "sagellm-kv"
"""As /proc/<pid>/maps shows it."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """`arena` is zeroed, and provided by the system as it is touched. `descriptor` is its file, opened to be read, and
    closed with the arena."""

    arena: mmap.mmap
    descriptor: int


def create_file() -> int:
    """An empty memory file; the caller closes it."""
    return os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def allocate(num_bytes: int) -> SharedMemory:
    """New memory. Raises OSError where the system has no more."""
    file = create_file()
    try:
        return open_file(file, num_bytes)
    finally:
        os.close(file)


def open_file(file: int, num_bytes: int) -> SharedMemory:
    """The memory of a file of `create_file`; whoever comes first gives it its size, for good.

    Sealed: a file that shrinks kills every process that touches what is gone from it.
    """
    os.ftruncate(file, num_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    arena = mmap.mmap(file, num_bytes)
    descriptor = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(arena, os.close, descriptor)
    return SharedMemory(arena, descriptor)


def map_file(descriptor: int, num_bytes: int) -> memoryview:
    """The memory of another process, to be read. Raises ValueError for a file that is shorter, or may become so."""
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    size = os.fstat(descriptor).st_size
    if not seals & fcntl.F_SEAL_SHRINK or size < num_bytes:
        raise ValueError(f"a memory file of {size} bytes with seals {seals:#x} does not keep {num_bytes} bytes")
    return memoryview(mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ))
