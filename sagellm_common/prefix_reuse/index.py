"""Who holds which prefix: block hash → workers, fed by worker events.

A block hash names its whole prefix (it is chained over the parent), so a dict is a radix tree flattened: a worker
holds a prefix of n blocks when it holds the first n hashes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from sagellm_common.core.types import BlockHash
from sagellm_common.prefix_reuse.metrics import IndexMetrics


class PrefixReuseIndex:
    """Bounded: beyond `max_blocks` entries the least recently used hashes are forgotten, of one prefix its end first.

    It is a hint. A forgotten or stale entry costs a recompute, never a wrong token: workers check hits themselves.
    """

    def __init__(self, max_blocks: int = 1 << 20) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}; it must be at least 1")
        self._max_blocks = max_blocks
        self._holders: OrderedDict[BlockHash, set[str]] = OrderedDict()
        self._held: dict[str, set[BlockHash]] = {}
        self.metrics = IndexMetrics()

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, worker_id: str, hashes: Sequence[BlockHash]) -> None:
        """The worker holds these blocks from now on; of one prefix in token order."""
        for block in reversed(hashes):
            self._holders.setdefault(block, set()).add(worker_id)
            self._holders.move_to_end(block)
            self._held.setdefault(worker_id, set()).add(block)
        while len(self._holders) > self._max_blocks:
            self._forget(next(iter(self._holders)))
            self.metrics.forgotten_blocks += 1

    def evict(self, worker_id: str, hashes: Iterable[BlockHash]) -> None:
        """The worker dropped these blocks. Unknown ones are fine."""
        for block in hashes:
            self._drop(worker_id, block)

    def invalidate(self, worker_id: str) -> int:
        """Forgets everything of a worker that is gone or was restarted; returns how many blocks that were."""
        blocks = list(self._held.get(worker_id, ()))
        self.evict(worker_id, blocks)
        return len(blocks)

    def lookup(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Longest prefix of `hashes` per worker, in blocks. Workers that do not hold the first block are absent."""
        depths: dict[str, int] = {}
        alive: set[str] = set()
        for depth, block in enumerate(hashes):
            holders = self._holders.get(block)
            if holders is not None and depth and alive <= holders:
                continue
            still = (set(holders) if depth == 0 else alive & holders) if holders else set()
            depths.update((worker, depth) for worker in alive - still)
            alive = still
            if not alive:
                break
        depths.update((worker, len(hashes)) for worker in alive)
        longest = max(depths.values(), default=0)
        for block in reversed(hashes[:longest]):
            self._holders.move_to_end(block)
        self.metrics.record_lookup(len(hashes), longest)
        return depths

    def _forget(self, block: BlockHash) -> None:
        for worker_id in list(self._holders.get(block, ())):
            self._drop(worker_id, block)

    def _drop(self, worker_id: str, block: BlockHash) -> None:
        held, holders = self._held.get(worker_id), self._holders.get(block)
        if held is None or holders is None or block not in held:
            return
        held.discard(block)
        holders.discard(worker_id)
        if not held:
            del self._held[worker_id]
        if not holders:
            del self._holders[block]
