"""Work that nobody waits for, yet nobody forgets: it is awaited or cancelled when its owner closes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from sagellm_common.core.errors import SageError

log = logging.getLogger(__name__)


class Background:
    """A set of running tasks. What they raise is logged: SageError as one line, anything else with its traceback."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], name: str, on_end: Callable[[], None] | None = None) -> None:
        """Runs `work`. `on_end` is called however it ends, even when it is cancelled before it began."""
        task = asyncio.create_task(self._logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # of a task cancelled before it began, nobody else would
        if on_end is not None:
            task.add_done_callback(lambda _: on_end())

    async def close(self, grace_s: float = 0.0) -> None:
        """Waits `grace_s` for what runs, then cancels it and waits for its end. Idempotent."""
        if self._tasks and grace_s > 0:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _logged(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except SageError as err:
            log.info("%s: %s", name, err)
        except Exception:
            log.exception("%s failed", name)
