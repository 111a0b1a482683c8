"""Policies that know some of the future: what a policy without it cannot have, and how much each bit of it is worth."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Container, Iterator, Sequence
from itertools import chain

Trace = Sequence[Sequence[int]]


class KnowsUses:
    """Knows how often each block will be used again, not when: what never is goes first, then the least recent."""

    def __init__(self, trace: Trace) -> None:
        self._left = Counter(chain.from_iterable(trace))
        self._done: OrderedDict[int, None] = OrderedDict()
        self._wanted: OrderedDict[int, None] = OrderedDict()

    def access(self, path: Sequence[int], depth: int = 0) -> None:
        for key in reversed(path):
            self._left[key] -= 1
            self.remove(key)
            (self._wanted if self._left[key] else self._done)[key] = None

    def evict(self, count: int, keep: Container[int] = ()) -> list[int]:
        return [(self._done or self._wanted).popitem(last=False)[0] for _ in range(min(count, len(self)))]

    def remove(self, key: int) -> None:
        self._done.pop(key, None)
        self._wanted.pop(key, None)

    def __len__(self) -> int:
        return len(self._done) + len(self._wanted)

    def __iter__(self) -> Iterator[int]:
        return chain(self._done, self._wanted)


class KnowsWindow:
    """Knows the next `window` block accesses: what is not among them goes first, the least recent of it; then what is
    used last."""

    def __init__(self, trace: Trace, window: int) -> None:
        accesses = [key for path in trace for key in reversed(path)]
        never = len(accesses) + window + 1
        self._window = window
        self._next_use = [never] * len(accesses)
        seen: dict[int, int] = {}
        for at in range(len(accesses) - 1, -1, -1):
            self._next_use[at] = seen.get(accesses[at], never)
            seen[accesses[at]] = at
        self._now = 0
        self._known: dict[int, int] = {}
        self._later: OrderedDict[int, None] = OrderedDict()
        self._soon: list[tuple[int, int]] = []

    def access(self, path: Sequence[int], depth: int = 0) -> None:
        for key in reversed(path):
            self._known[key] = self._next_use[self._now]
            self._later[key] = None
            self._later.move_to_end(key)
            self._now += 1

    def evict(self, count: int, keep: Container[int] = ()) -> list[int]:
        gone: list[int] = []
        while len(gone) < count and self._known:
            if self._later:
                key, _ = self._later.popitem(last=False)
                if self._known[key] - self._now < self._window:
                    heapq.heappush(self._soon, (-self._known[key], key))
                    continue
            else:
                use, key = heapq.heappop(self._soon)
                if self._known.get(key) != -use:
                    continue  # it was used since
            del self._known[key]
            gone.append(key)
        return gone

    def remove(self, key: int) -> None:
        self._known.pop(key, None)
        self._later.pop(key, None)

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)
