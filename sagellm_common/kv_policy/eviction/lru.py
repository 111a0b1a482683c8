"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from sagellm_common.kv_policy.eviction.base import K, Queueing


class Lru(Queueing[K, None]):
    """O(1). Of one path the end counts as used first, so it goes first."""

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._order: OrderedDict[K, None] = OrderedDict()

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        self._return(path)
        order = self._order
        for key in reversed(path):
            order[key] = None
            order.move_to_end(key)

    def remove(self, key: K) -> None:
        self._order.pop(key, None)
        self._aside.pop(key, None)

    def __len__(self) -> int:
        return len(self._order) + len(self._aside)

    def __iter__(self) -> Iterator[K]:
        return chain(self._order, self._aside)

    def _victim(self) -> tuple[K, None] | None:
        return self._order.popitem(last=False) if self._order else None

    def _put_back(self, key: K, place: None) -> None:
        self._order[key] = None
