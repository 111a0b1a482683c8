"""A step that hangs must not hang the worker: who runs the engine's thread looks at its last sign of life."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from sagellm_common.core.clock import Clock

Sleep = Callable[[float], Awaitable[None]]


class StepWatch:
    """The engine's thread tells of its steps, others ask how long it has been silent."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sign_of_life_s: float | None = None  # None between steps

    @contextmanager
    def step(self) -> Iterator[None]:
        self._sign_of_life_s = self._clock.now()
        try:
            yield
        finally:
            self._sign_of_life_s = None

    def alive(self) -> None:
        """A part of the step under way is done. A no-op between steps."""
        if self._sign_of_life_s is not None:
            self._sign_of_life_s = self._clock.now()

    def silent_s(self) -> float:
        """0 between steps: an engine that has nothing to do is not stuck."""
        since = self._sign_of_life_s
        return 0.0 if since is None else self._clock.now() - since


async def stuck(watch: StepWatch, limit_s: float, sleep: Sleep = asyncio.sleep) -> None:
    """Returns once the watched engine has been silent for limit_s."""
    while (left_s := limit_s - watch.silent_s()) > 0:
        await sleep(left_s)


def where_is(thread: threading.Thread) -> str:
    """The thread's stack, for the log."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended"
