"""The changes of the store's pool, numbered, for watchers that come, fall behind and come back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sagellm_common.core.kv import BlockEvent
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol

HISTORY_EVENTS = 4096


@dataclass(frozen=True, slots=True)
class Revision:
    """State of the pool after change number `number`: all of it (a snapshot), or what that change did."""

    number: int
    event: BlockEvent
    snapshot: bool = False


class BlockLog:
    """Made on the event loop that watches; the pool may change from any thread."""

    def __init__(self, pool: KVBackendProtocol) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._number = 0
        self._history: deque[Revision] = deque(maxlen=HISTORY_EVENTS)
        self._changed = asyncio.Event()
        pool.watch(self._on_event)

    async def watch(self, from_number: int) -> AsyncIterator[Revision]:
        """Everything after `from_number`: a snapshot first when that is unknown or too long ago, then each change."""
        # 0 is a watcher that knows nothing, not one that has seen the empty beginning.
        seen = from_number or None
        while True:
            changed = self._changed
            missed = None if seen is None else self._after(seen)
            if missed is None:
                missed = [self._snapshot()]
            for revision in missed:
                seen = revision.number
                yield revision
            await changed.wait()

    def _after(self, number: int) -> list[Revision] | None:
        """None when the history does not reach back to `number`."""
        with self._lock:
            oldest = self._number - len(self._history)
            if not oldest <= number <= self._number:
                return None
            return [revision for revision in self._history if revision.number > number]

    def _snapshot(self) -> Revision:
        # The number before the hashes: a change in between is told again, and telling twice is harmless.
        with self._lock:
            number = self._number
        return Revision(number, BlockEvent(stored=tuple(self._pool.cached_hashes())), snapshot=True)

    def _on_event(self, event: BlockEvent) -> None:
        with self._lock:
            self._number += 1
            self._history.append(Revision(self._number, event))
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
