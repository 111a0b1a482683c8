"""KV memory as the pools, the byte paths and the engines share it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sagellm_common.core.types import BlockHash, BlockIds


@dataclass(frozen=True, slots=True)
class KvRegion:
    """KV memory as bytes. One block is contiguous: all layers, keys and values.

    `view` is a writable memoryview of num_blocks x block_bytes bytes; block b starts at b * block_bytes. The byte
    path reads and writes it in place.
    """

    view: memoryview
    block_bytes: int
    num_blocks: int

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside the pool of {self.num_blocks} blocks")
        start = block_id * self.block_bytes
        return self.view[start : start + self.block_bytes]

    def runs(self, block_ids: Sequence[int] | BlockIds) -> list[memoryview]:
        """Views of the blocks in order, neighbours in memory merged into one view."""
        ids = np.asarray(block_ids, dtype=np.int64)
        if ids.size == 0:
            return []
        if ids.min() < 0 or ids.max() >= self.num_blocks:
            raise IndexError(f"blocks {ids.min()}..{ids.max()} are outside the pool of {self.num_blocks} blocks")
        cuts = np.flatnonzero(np.diff(ids) != 1) + 1
        bounds = [0, *cuts.tolist(), ids.size]
        size = self.block_bytes
        return [self.view[int(ids[a]) * size : (int(ids[a]) + b - a) * size] for a, b in itertools.pairwise(bounds)]


@dataclass(slots=True, eq=False)
class Allocation:
    """References on blocks in token order, held by whoever has this object until it gives it to `free`.

    The first `num_cached_tokens` tokens have valid KV: from the prefix cache at allocation, and from whoever filled
    blocks and raised the number since. The leading `num_shared_blocks` are shared and must not be written.
    """

    block_ids: BlockIds
    num_cached_tokens: int = 0
    num_shared_blocks: int = 0


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Blocks that became available for reuse, or ceased to be."""

    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
