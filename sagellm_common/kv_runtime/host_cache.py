"""Host memory below a worker's KV cache: what the cache gives up goes there, and comes back on a prefix hit.

pool ──evicts──► keep: a copy, before the memory is somebody else's
  ▲                │
  └── bring_back ◄─┘   into blocks allocated for the sequence, behind those that the pool still had
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sagellm_common.core.clock import Clock
from sagellm_common.core.kv import BlockEvent, KvMemory
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvTierStats, TokenIds
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.host_tier import HostTier, copy_blocks
from sagellm_common.kv_runtime.tiers import BlockKey

MAX_COPY_BYTES = 64 << 20
"""Brought back at a time: some milliseconds. Whoever allocates waits for it, and so may others on its thread."""


class HostCache:
    """Thread-safe. `layout` is that of the pool above."""

    def __init__(self, budget_bytes: int, layout: KvLayout, clock: Clock, eviction: str = "lru") -> None:
        """Raises ConfigError when not one block fits the budget."""
        self._pool = HostKvPool(budget_bytes, clock, layout, "kv.host_budget_bytes", eviction=eviction)
        self._tier = HostTier(self._pool, "host")

    def keep(self, keys: Sequence[BlockKey], memory: KvMemory, slots: BlockIds) -> None:
        """Copies of the blocks in these slots, which must not change meanwhile; of as many as there is room for."""
        with memory.reading(slots) as (region, ids):
            self._tier.write(keys, region, ids)

    def bring_back(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        contexts: Sequence[bytes],
        memory: KvMemory,
        slots: BlockIds,
    ) -> int:
        """Fills slots[i] with the block of hashes[i], as far as the leading ones are here for exactly these tokens,
        after exactly those before them.

        Returns how many, `most_blocks` at most. Nobody else may use the slots meanwhile.
        """
        size, most = self._pool.layout.block_size_tokens, self.most_blocks
        hits = self._pool.get(hashes[:most], token_ids[: len(hashes[:most]) * size], contexts[:most])
        try:
            count = len(hits.block_ids)
            if count:
                with memory.writing(slots[:count]) as (region, ids):
                    copy_blocks(self._pool.regions(), hits.block_ids, region, np.asarray(ids))
        finally:
            self._pool.free(hits)
        return count

    @property
    def most_blocks(self) -> int:
        return max(1, MAX_COPY_BYTES // self._pool.layout.block_bytes)

    def hashes(self) -> list[BlockHash]:
        return self._pool.cached_hashes()

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Called with the lock of this memory held, and often with that of the pool above."""
        self._pool.watch(callback)

    @property
    def rejected(self) -> int:
        return self._pool.rejected

    def stats(self) -> KvTierStats:
        return self._tier.stats()
