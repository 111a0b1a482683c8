"""Workers in order of their load, kept as loads change: who has the least is known without a look at all."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

W = TypeVar("W")
Key = tuple[float, ...]


class Ranking(Generic[W]):
    """By `key(worker)`, equals in the order they came. `update` whoever's key has changed.

    A sorted list: to move one of a thousand entries is a memmove of some kilobytes, less than a heap's upkeep.
    """

    def __init__(self, workers: Sequence[W], key: Callable[[W], Key]) -> None:
        self._key = key
        self._workers: dict[int, W] = {}
        """By the number they got as they came."""
        self._entries: dict[int, tuple[Key, int]] = {}
        """By id(worker): its entry in the order."""
        self._order: list[tuple[Key, int]] = []
        self._numbers = itertools.count()
        for worker in workers:
            self.add(worker)

    def add(self, worker: W) -> None:
        number = next(self._numbers)
        self._workers[number] = worker
        self._entries[id(worker)] = entry = self._key(worker), number
        bisect.insort(self._order, entry)

    def remove(self, worker: W) -> None:
        """Raises KeyError for one that is not here."""
        entry = self._entries.pop(id(worker))
        del self._order[bisect.bisect_left(self._order, entry)]
        del self._workers[entry[1]]

    def update(self, worker: W) -> None:
        """A no-op for one that is not here."""
        before = self._entries.get(id(worker))
        if before is None or (now := self._key(worker)) == before[0]:
            return
        del self._order[bisect.bisect_left(self._order, before)]
        self._entries[id(worker)] = entry = now, before[1]
        bisect.insort(self._order, entry)

    def first(self, count: int) -> list[W]:
        return [self._workers[number] for _, number in islice(self._order, count)]
