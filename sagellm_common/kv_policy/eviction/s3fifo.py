"""S3-FIFO (Yang et al., SOSP 2023): a small queue filters what is used once, a main queue keeps the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from itertools import chain
from typing import Generic

from sagellm_common.kv_policy.eviction.base import K

SMALL_SHARE = 0.1
MAX_USES = 3


class S3Fifo(Generic[K]):
    """O(1) amortised. What leaves the small queue unused is remembered; if it comes back it enters the main queue."""

    def __init__(self, capacity_blocks: int) -> None:
        self._small_blocks = max(1, round(capacity_blocks * SMALL_SHARE))
        self._main_blocks = max(1, capacity_blocks - self._small_blocks)
        self._small: OrderedDict[K, int] = OrderedDict()
        self._main: OrderedDict[K, int] = OrderedDict()
        """Uses since it was queued, at most MAX_USES."""
        self._gone: OrderedDict[K, None] = OrderedDict()

    def access(self, path: Sequence[K]) -> None:
        for key in reversed(path):
            if key in self._small:
                self._small[key] = min(self._small[key] + 1, MAX_USES)
            elif key in self._main:
                self._main[key] = min(self._main[key] + 1, MAX_USES)
            elif key in self._gone:
                del self._gone[key]
                self._main[key] = 0
            else:
                self._small[key] = 0

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        gone: list[K] = []
        kept: list[tuple[OrderedDict[K, int], K, int]] = []
        while len(gone) < count and len(self):
            from_small = len(self._small) >= self._small_blocks or not self._main
            # What is in `keep` stands aside meanwhile; the other queue may have what can go.
            queue = (self._small or self._main) if from_small else self._main
            key, uses = queue.popitem(last=False)
            if key in keep:
                kept.append((queue, key, uses))
            elif queue is self._small and uses:
                self._main[key] = 0
            elif uses:
                self._main[key] = uses - 1
            else:
                gone.append(key)
                if queue is self._small:
                    self._gone[key] = None
        for queue, key, uses in reversed(kept):
            queue[key] = uses
            queue.move_to_end(key, last=False)
        while len(self._gone) > self._main_blocks:
            self._gone.popitem(last=False)
        return gone

    def remove(self, key: K) -> None:
        self._small.pop(key, None)
        self._main.pop(key, None)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __iter__(self) -> Iterator[K]:
        return chain(self._small, self._main)
