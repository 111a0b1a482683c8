"""A virtual clock: what is to happen, in order of time; of equal times, in the order it was planned."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Never before now. An action that may be out of date by then checks that itself."""
        heapq.heappush(self._events, (max(time_s, self.now_s), next(self._numbers), action))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()

    def stop(self) -> None:
        """Nothing more happens, whatever was planned."""
        self._events.clear()
