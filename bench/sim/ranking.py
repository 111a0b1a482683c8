"""Workers in order of their load, kept as loads change: who has the least is known without a look at all."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

W = TypeVar("W")


class Ranking(Generic[W]):
    """By `key(worker)`, equals in the order given. `update` whoever's key has changed.

    A sorted list: to move one of a thousand entries is a memmove of some kilobytes, less than a heap's upkeep.
    """

    def __init__(self, workers: Sequence[W], key: Callable[[W], tuple[float, ...]]) -> None:
        self._key = key
        self._workers = list(workers)
        self._number = {id(worker): number for number, worker in enumerate(workers)}
        self._keys = [key(worker) for worker in workers]
        self._order = sorted(zip(self._keys, range(len(workers)), strict=True))

    def update(self, worker: W) -> None:
        number, now = self._number[id(worker)], self._key(worker)
        if now == (before := self._keys[number]):
            return
        del self._order[bisect.bisect_left(self._order, (before, number))]
        bisect.insort(self._order, (now, number))
        self._keys[number] = now

    def first(self, count: int) -> list[W]:
        return [self._workers[number] for _, number in islice(self._order, count)]
