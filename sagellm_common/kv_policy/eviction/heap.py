"""A priority queue whose entries change rank: the base of policies that order blocks by a number."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic

from sagellm_common.kv_policy.eviction.base import K

Rank = tuple[float, ...]


class RankedBlocks(Generic[K]):
    """Blocks by rank, the lowest first. O(log n): outdated entries stay in the heap until they surface."""

    def __init__(self) -> None:
        self._rank: dict[K, Rank] = {}
        self._heap: list[tuple[Rank, int, K]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, key: object) -> bool:
        return key in self._rank

    def __iter__(self) -> Iterator[K]:
        return iter(sorted(self._rank, key=self._rank.__getitem__))

    def put(self, key: K, rank: Rank) -> None:
        self._rank[key] = rank
        self._count += 1
        heapq.heappush(self._heap, (rank, self._count, key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [entry for entry in self._heap if self._rank.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def pop(self) -> tuple[K, Rank] | None:
        """The lowest, with its rank; None when there is none."""
        while self._heap:
            rank, _, key = heapq.heappop(self._heap)
            if self._rank.get(key) == rank:
                del self._rank[key]
                return key, rank
        return None

    def drop(self, key: K) -> None:
        self._rank.pop(key, None)
