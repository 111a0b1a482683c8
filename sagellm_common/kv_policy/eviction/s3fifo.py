"""S3-FIFO (Yang et al., SOSP 2023): a small queue filters what is used once, a main queue keeps the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from sagellm_common.kv_policy.eviction.base import K, Queueing

SMALL_SHARE = 0.1
MAX_USES = 3
SMALL, MAIN = 0, 1


class S3Fifo(Queueing[K, int]):
    """O(1) amortised. What leaves the small queue unused is remembered; if it comes back it enters the main queue."""

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._small_blocks = max(1, round(capacity_blocks * SMALL_SHARE))
        self._main_blocks = max(1, capacity_blocks - self._small_blocks)
        self._small: OrderedDict[K, int] = OrderedDict()
        self._main: OrderedDict[K, int] = OrderedDict()
        """Uses since it was queued, at most MAX_USES."""
        self._gone: OrderedDict[K, None] = OrderedDict()

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        self._return(path)
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

    def remove(self, key: K) -> None:
        self._small.pop(key, None)
        self._main.pop(key, None)
        self._aside.pop(key, None)

    def __len__(self) -> int:
        return len(self._small) + len(self._main) + len(self._aside)

    def __iter__(self) -> Iterator[K]:
        return chain(self._small, self._main, self._aside)

    def _victim(self) -> tuple[K, int] | None:
        while self._small or self._main:
            if self._small and (len(self._small) >= self._small_blocks or not self._main):
                key, uses = self._small.popitem(last=False)
                if not uses:
                    return key, SMALL
                self._main[key] = 0
            else:
                key, uses = self._main.popitem(last=False)
                if not uses:
                    return key, MAIN
                self._main[key] = uses - 1
        return None

    def _put_back(self, key: K, place: int) -> None:
        (self._main if place == MAIN else self._small)[key] = 0

    def _give_up(self, key: K, place: int) -> None:
        if place == SMALL:
            self._gone[key] = None

    def _forget(self) -> None:
        while len(self._gone) > self._main_blocks:
            self._gone.popitem(last=False)
