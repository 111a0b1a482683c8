"""Who holds which prefix: block hash → workers and tiers, fed by worker events.

A block hash names its whole prefix (it is chained over the parent), so a hash table is a radix tree flattened: a worker
holds a prefix of n blocks when it holds the first n hashes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import Tier
from sagellm_common.prefix_reuse import native
from sagellm_common.prefix_reuse.holder_table import MAX_BLOCKS, Depths, HolderTable, NativeTable, PythonTable
from sagellm_common.prefix_reuse.metrics import PrefixReuseMetrics


def make_table(max_blocks: int, guard: AbstractContextManager[Any]) -> HolderTable:
    """The compiled one where it was built. `guard` is for the other."""
    library = native.library()
    return NativeTable(library, max_blocks) if library is not None else PythonTable(max_blocks, guard)


class PrefixReuseIndex:
    """Bounded: beyond `max_blocks` blocks the least recently used are forgotten, of one prefix its end first.

    It is a hint. A forgotten or stale entry costs a recompute, never a wrong token: workers check hits themselves
    (`matcher`). Hashes are packed, 16 bytes each, those of a prefix in token order. Any thread may call it, where the
    table is compiled or `guard` is a lock; of one worker a single thread at a time tells the changes.
    """

    def __init__(
        self,
        max_blocks: int = 1 << 20,
        guard: AbstractContextManager[Any] | None = None,
        table: HolderTable | None = None,
    ) -> None:
        if not 1 <= max_blocks <= MAX_BLOCKS:
            raise ConfigError(f"max_blocks is {max_blocks}; it must be 1 to {MAX_BLOCKS}")
        self._table = table or make_table(max_blocks, guard or nullcontext())
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return self._table.metrics().blocks

    def insert(self, worker_id: str, hashes: bytes, tier: Tier = Tier.DEVICE) -> None:
        """The worker holds these blocks from now on."""
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._slots[worker_id] = self._table.open()
            self._names[slot] = worker_id
        self._table.insert(slot, tier, hashes)

    def evict(self, worker_id: str, hashes: bytes, tier: Tier = Tier.DEVICE) -> None:
        """The worker dropped these blocks from the tier. Unknown ones are fine."""
        slot = self._slots.get(worker_id)
        if slot is not None:
            self._table.remove(slot, tier, hashes)

    def invalidate(self, worker_id: str) -> int:
        """Forgets everything of a worker that is gone or was restarted; returns how many blocks that were."""
        slot = self._slots.pop(worker_id, None)
        if slot is None:
            return 0
        del self._names[slot]
        return self._table.close(slot)

    def lookup(self, hashes: bytes) -> dict[str, Depths]:
        """How many leading blocks each worker holds, by tier: in it or in faster ones; the last is the longest prefix.

        Workers that do not hold the first block are absent.
        """
        names = self._names
        return {names[slot]: depths for slot, depths in self._table.match(hashes).items() if slot in names}

    def held(self, worker_id: str) -> dict[Tier, int]:
        """Blocks of the worker that are known, by tier."""
        slot = self._slots.get(worker_id)
        return {} if slot is None else {tier: self._table.held(slot, tier) for tier in Tier}

    @property
    def metrics(self) -> PrefixReuseMetrics:
        return self._table.metrics()
