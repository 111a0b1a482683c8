"""The payload: KV-like blocks of a pool, chosen at random on both sides, so that nothing is contiguous."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sagellm_common.core import shared_memory
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Pool:
    """Of both processes: `num_blocks` blocks of `block_bytes`."""

    num_blocks: int
    block_bytes: int

    def region(self, *, filled: bool) -> KvRegion:
        """In a memory file, as the CPU engine's KV cache is; `filled` with the same random bytes everywhere."""
        memory = shared_memory.allocate(self.num_blocks * self.block_bytes)
        view = memoryview(memory.arena)
        # Touched, or the first pull pays for the pages. SFC64 fills a gigabyte in half a second.
        data, rng = np.frombuffer(view, dtype=np.uint64), np.random.Generator(np.random.SFC64(0))
        for at in range(0, len(data), 1 << 20):
            part = data[at : at + (1 << 20)]
            part[:] = rng.integers(0, 1 << 63, len(part), dtype=np.uint64) if filled else 0
        return KvRegion(view, self.block_bytes, self.num_blocks, descriptor=memory.descriptor)

    def pick(self, rng: np.random.Generator, count: int) -> BlockIds:
        return rng.permutation(self.num_blocks)[:count].astype(np.int32)


class Contestant(Protocol):
    """One way to copy blocks of the source process into the own region."""

    name: str

    async def pull(self, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        """Returns when all of them are here. After an error the contestant is out."""


class MemoryCopy:
    """What no byte path can beat with one thread: numpy, block by block, within one process."""

    name = "memcpy"

    def __init__(self, source: KvRegion, target: KvRegion) -> None:
        self._source, self._target = source, target

    async def pull(self, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        size, source, target = self._source.block_bytes, self._source.view, self._target.view
        theirs, mine = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)
        for from_block, to_block in zip(source_blocks.tolist(), target_blocks.tolist(), strict=True):
            mine[to_block * size : (to_block + 1) * size] = theirs[from_block * size : (from_block + 1) * size]


def cpu_seconds(pid: int) -> Callable[[], float]:
    """A clock of all CPU time of a process, in nanosecond steps (Linux: MAKE_PROCESS_CPUCLOCK with CPUCLOCK_SCHED)."""
    clock = (~pid << 3) | 2
    return lambda: time.clock_gettime(clock)
