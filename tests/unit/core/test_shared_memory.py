"""Memory files: what a peer maps is what was written, and cannot be taken from under it."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest

from sagellm_common.core import shared_memory


def test_a_peer_sees_what_is_written_and_writes_nothing() -> None:
    memory = shared_memory.allocate(10_000)
    seen = shared_memory.map_file(memory.descriptor, 10_000)
    assert not any(seen)
    memory.arena[5000:5003] = b"abc"
    assert seen[5000:5003] == b"abc"
    with pytest.raises(TypeError):
        seen[0] = 1
    with pytest.raises(OSError):
        os.write(memory.descriptor, b"x")


def test_it_keeps_its_size() -> None:
    file = shared_memory.create_file()
    one, two = shared_memory.open_file(file, 4096), shared_memory.open_file(file, 4096)
    one.arena[0] = 7
    assert two.arena[0] == 7
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(file, size)
    os.close(file)


def test_a_file_that_is_short_or_may_shrink_is_refused() -> None:
    memory = shared_memory.allocate(4096)
    with pytest.raises(ValueError, match="does not keep 4097 bytes"):
        shared_memory.map_file(memory.descriptor, 4097)
    file = shared_memory.create_file()
    os.ftruncate(file, 4096)
    with pytest.raises(ValueError, match="seals 0x0"):
        shared_memory.map_file(file, 4096)
    os.close(file)


def test_the_file_is_closed_with_the_last_view_of_it() -> None:
    memory = shared_memory.allocate(4096)
    view, descriptor = np.frombuffer(memory.arena, dtype=np.uint8), memory.descriptor
    del memory
    gc.collect()
    os.fstat(descriptor)
    del view
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)
