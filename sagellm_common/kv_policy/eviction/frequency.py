"""By how often blocks were used: LFU, and GDSF, which ages counts and minds what a block costs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Generic

from sagellm_common.kv_policy.eviction.base import K
from sagellm_common.kv_policy.eviction.heap import RankedBlocks


class Lfu(Generic[K]):
    """Least frequently used; of equals the least recently used. Counts end when a block goes."""

    def __init__(self, capacity_blocks: int) -> None:
        self._blocks: RankedBlocks[K] = RankedBlocks()
        self._uses: dict[K, int] = {}
        self._now = 0

    def access(self, path: Sequence[K]) -> None:
        for key in reversed(path):
            self._now += 1
            uses = self._uses[key] = self._uses.get(key, 0) + 1
            self._blocks.put(key, (uses, self._now))

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        gone = [key for key, _ in self._blocks.pop(count, keep)]
        for key in gone:
            del self._uses[key]
        return gone

    def remove(self, key: K) -> None:
        self._blocks.drop(key)
        self._uses.pop(key, None)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[K]:
        return iter(self._blocks)


class Gdsf(Generic[K]):
    """Greedy-Dual Size Frequency (Cherkasova 1998): rank = age + uses x cost / size, age being the last victim's rank.

    `cost(depth)` is what it takes to compute the block with this number in its path again, over its size; the default
    grows with depth as attention does.
    """

    def __init__(self, capacity_blocks: int, cost: Callable[[int], float] = lambda depth: 1.0 + depth / 1024) -> None:
        self._blocks: RankedBlocks[K] = RankedBlocks()
        self._uses: dict[K, int] = {}
        self._cost = cost
        self._age = 0.0
        self._now = 0

    def access(self, path: Sequence[K]) -> None:
        for depth in range(len(path) - 1, -1, -1):
            key = path[depth]
            self._now += 1
            uses = self._uses[key] = self._uses.get(key, 0) + 1
            self._blocks.put(key, (self._age + uses * self._cost(depth), self._now))

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        gone = self._blocks.pop(count, keep)
        for key, rank in gone:
            self._age = rank[0]
            del self._uses[key]
        return [key for key, _ in gone]

    def remove(self, key: K) -> None:
        self._blocks.drop(key)
        self._uses.pop(key, None)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[K]:
        return iter(self._blocks)
