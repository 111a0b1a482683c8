"""The order in which pulls start: the more urgent first, some at a time, none that waits without end."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from dataclasses import replace

from sagellm_common.comm_backend.protocol import KVTransferChannel, Pull, PullAlong, TransferResult
from sagellm_common.core.errors import QueueFull
from sagellm_common.core.types import BlockIds

RETRY_AFTER_S = 0.5


class PullQueue:
    """A channel whose pulls take turns: those of a higher priority first, equal ones in the order in which they came.

    Pulls along a computation, which mostly wait for it, have turns of their own, as many: they hold nobody else up.
    `pull` and `pull_along` raise QueueFull too: when `max_waiting` wait already, all of them at least as urgent, or
    when the turn did not come within `timeout_s`. What is left of it is the pull's.
    """

    def __init__(self, inner: KVTransferChannel, max_pulls: int, max_waiting: int) -> None:
        self._inner = inner
        self.name = inner.name
        self.pulls_along = inner.pulls_along
        self.encodes = inner.encodes
        self._pulls = _Turns(max_pulls, max_waiting)
        self._along = _Turns(max_pulls, max_waiting)

    @property
    def address(self) -> str:
        return self._inner.address

    async def start(self) -> str:
        return await self._inner.start()

    async def pull(self, asked: Pull) -> TransferResult:
        left_s = await self._pulls.begin(asked.priority, asked.timeout_s)
        try:
            return await self._inner.pull(asked if left_s == asked.timeout_s else replace(asked, timeout_s=left_s))
        finally:
            self._pulls.end()

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        left_s = await self._along.begin(asked.priority, asked.timeout_s)
        try:
            return await self._inner.pull_along(replace(asked, timeout_s=left_s))
        finally:
            self._along.end()

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        return await self._inner.serve_pull(transfer_id, epoch, block_ids, pair_id)

    async def close(self) -> None:
        await self._inner.close()


class _Turns:
    """At most `limit` turns at a time. Of one event loop."""

    def __init__(self, limit: int, max_waiting: int) -> None:
        self._free = limit
        self._max_waiting = max_waiting
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        """(-priority, arrival, granted): a heap. Those done are no longer waiting."""
        self._arrivals = itertools.count()

    async def begin(self, priority: int, timeout_s: float) -> float:
        """Returns what is left of timeout_s; `end` follows. Raises QueueFull."""
        if self._free:
            self._free -= 1
            return timeout_s
        began_s = time.monotonic()
        await self._granted(priority, timeout_s)
        return timeout_s - (time.monotonic() - began_s)

    def end(self) -> None:
        self._pass_on()

    async def _granted(self, priority: int, timeout_s: float) -> None:
        granted = asyncio.get_running_loop().create_future()
        entry = (-priority, next(self._arrivals), granted)
        self._make_room(entry)
        heapq.heappush(self._waiting, entry)
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except BaseException as err:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._pass_on()  # it came at the same moment
            if isinstance(err, TimeoutError):
                raise self._full(f"no turn to pull within {timeout_s:g} s") from None
            raise
        finally:
            granted.cancel()

    def _make_room(self, newcomer: tuple[int, int, asyncio.Future[None]]) -> None:
        """Turns the least urgent of those who wait and the newcomer away, if there are too many."""
        self._waiting = [entry for entry in self._waiting if not entry[2].done()]
        heapq.heapify(self._waiting)
        if len(self._waiting) < self._max_waiting:
            return
        last = max([*self._waiting, newcomer], key=lambda entry: entry[:2])
        refusal = self._full(f"{self._max_waiting} more urgent ones are waiting to pull")
        if last is newcomer:
            raise refusal
        last[2].set_exception(refusal)
        self._make_room(newcomer)

    def _pass_on(self) -> None:
        while self._waiting:
            granted = heapq.heappop(self._waiting)[2]
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1

    @staticmethod
    def _full(why: str) -> QueueFull:
        return QueueFull(
            f"transport.max_pulls: {why}; try again, or let more pull at a time", retry_after_s=RETRY_AFTER_S
        )
