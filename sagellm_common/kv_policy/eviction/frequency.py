"""By how often blocks were used: LFU, and GDSF, which ages counts and minds what a block costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from sagellm_common.kv_policy.eviction.base import Cost, K, Queueing
from sagellm_common.kv_policy.eviction.heap import Rank, RankedBlocks


class Lfu(Queueing[K, Rank]):
    """Least frequently used; of equals the least recently used. Counts end when a block goes."""

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._blocks: RankedBlocks[K] = RankedBlocks()
        self._uses: dict[K, int] = {}
        self._now = 0

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        self._return(path)
        for key in reversed(path):
            self._now += 1
            uses = self._uses[key] = self._uses.get(key, 0) + 1
            self._blocks.put(key, (uses, self._now))

    def remove(self, key: K) -> None:
        self._blocks.drop(key)
        self._aside.pop(key, None)
        self._uses.pop(key, None)

    def __len__(self) -> int:
        return len(self._uses)

    def __iter__(self) -> Iterator[K]:
        return chain(self._blocks, self._aside)

    def _victim(self) -> tuple[K, Rank] | None:
        return self._blocks.pop()

    def _put_back(self, key: K, place: Rank) -> None:
        self._blocks.put(key, place)

    def _give_up(self, key: K, place: Rank) -> None:
        del self._uses[key]


class Gdsf(Queueing[K, Rank]):
    """Greedy-Dual Size Frequency (Cherkasova 1998): rank = age + uses x cost / size, age being the last victim's rank.

    The default cost grows with depth as attention does.
    """

    def __init__(self, capacity_blocks: int, cost: Cost = lambda depth: 1.0 + depth / 1024) -> None:
        super().__init__()
        self._blocks: RankedBlocks[K] = RankedBlocks()
        self._uses: dict[K, int] = {}
        self._cost = cost
        self._age = 0.0
        self._now = 0

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        self._return(path)
        for at in range(len(path) - 1, -1, -1):
            key = path[at]
            self._now += 1
            uses = self._uses[key] = self._uses.get(key, 0) + 1
            self._blocks.put(key, (self._age + uses * self._cost(depth + at), self._now))

    def remove(self, key: K) -> None:
        self._blocks.drop(key)
        self._aside.pop(key, None)
        self._uses.pop(key, None)

    def __len__(self) -> int:
        return len(self._uses)

    def __iter__(self) -> Iterator[K]:
        return chain(self._blocks, self._aside)

    def _victim(self) -> tuple[K, Rank] | None:
        return self._blocks.pop()

    def _put_back(self, key: K, place: Rank) -> None:
        self._blocks.put(key, place)

    def _give_up(self, key: K, place: Rank) -> None:
        self._age = place[0]
        del self._uses[key]
