"""Tokens without a model: each sequence gets one per step, and all steps of a worker come at one interval.

A sequence of two tokens or less gets them at once: it is there to tell what a request costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

OnToken = Callable[[int, bool], None]
"""Takes (index of the token, whether it is the last); must not wait."""

TOKEN = 42
AT_ONCE_TOKENS = 2


class Pace:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._running: dict[object, tuple[int, int, OnToken]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, key: object, first: int, end: int, on_token: OnToken) -> None:
        """Tokens [first, end) of a sequence."""
        if end <= AT_ONCE_TOKENS:
            for index in range(first, end):
                on_token(index, index + 1 == end)
            return
        self._running[key] = (first, end, on_token)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._step)

    def cancel(self, key: object) -> None:
        self._running.pop(key, None)

    def _step(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval_s, self._step) if self._running else None
        for key, (index, end, on_token) in list(self._running.items()):
            if index + 1 == end:
                del self._running[key]
            else:
                self._running[key] = (index + 1, end, on_token)
            on_token(index, index + 1 == end)
