"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from itertools import islice
from typing import Generic

from sagellm_common.kv_policy.eviction.base import K


class Lru(Generic[K]):
    """O(1). Of one path the end counts as used first, so it goes first."""

    def __init__(self, capacity_blocks: int) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def access(self, path: Sequence[K]) -> None:
        order = self._order
        for key in reversed(path):
            order[key] = None
            order.move_to_end(key)

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        gone = list(islice((key for key in self._order if key not in keep), count))
        for key in gone:
            del self._order[key]
        return gone

    def remove(self, key: K) -> None:
        self._order.pop(key, None)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[K]:
        return iter(self._order)
