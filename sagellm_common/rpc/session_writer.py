"""The sending half of a session stream: many requests, one writer, one message per turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, Self, TypeVar

from sagellm_common.core.errors import PeerLost

M = TypeVar("M")

STALL_TIMEOUT_S = 10.0


class SessionWriter(Generic[M]):
    """Sends what was added to `message`, all of it together: what one engine step adds leaves in one message.

    Adding never waits, so the engine's steps never wait for a peer. The backlog is bounded in time: a peer that takes
    no message for `stall_timeout_s` ends the session with PeerLost.

    `write_now` sends without waiting, and without another task's turn, or says False: then `write` waits for the peer.
    """

    def __init__(
        self,
        new_message: Callable[[], M],
        write: Callable[[M], Awaitable[None]],
        *,
        write_now: Callable[[M], bool] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._new_message = new_message
        self._write = write
        self._write_now = write_now
        self._loop = asyncio.get_running_loop()
        self._stall_timeout_s = stall_timeout_s
        self._next: M | None = None
        self._writing_since_s: float | None = None
        self._wake = asyncio.Event()
        self._closed = False

    @classmethod
    def of(cls, new_message: Callable[[], M], context: Any) -> Self:
        """To the peer of a servicer's call, whatever carries it."""
        return cls(new_message, context.write, write_now=getattr(context, "write_now", None))

    @property
    def message(self) -> M:
        """The message that leaves next. Add to it at once, on the event loop: it leaves when the caller waits."""
        if self._next is None:
            self._next = self._new_message()
            if self._write_now is None:
                self._wake.set()
            else:
                self._loop.call_soon(self.flush)
        return self._next

    def flush(self) -> None:
        """Sends what was added, now if the peer keeps up: for what stands between a request and its first token."""
        message = self._next
        if message is None:
            return
        if self._write_now is not None and self._writing_since_s is None and self._write_now(message):
            self._next = None
        else:
            self._wake.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[asyncio.TaskGroup]:
        """A task group for the session's requests, with the writer beside it.

        Leaving the block waits for the requests and until everything is sent. When the stream ends otherwise, all
        requests are cancelled. Raises PeerLost when the peer stalls.
        """
        try:
            async with asyncio.TaskGroup() as stream:
                watchdog = stream.create_task(self._watch(), name="session-watchdog")
                sending = stream.create_task(self.run(), name="session-writer")
                sending.add_done_callback(lambda _: watchdog.cancel())
                async with asyncio.TaskGroup() as requests:
                    yield requests
                self.close()
        except BaseExceptionGroup as group:
            # The first error explains the end; the others are its consequences.
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    def close(self) -> None:
        """Lets `run` return once everything is sent."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Until `close`."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            message, self._next = self._next, None
            if message is not None:
                self._writing_since_s = loop.time()
                await self._write(message)
                self._writing_since_s = None
            if self._closed and self._next is None:
                return

    async def _watch(self) -> None:
        """Raises PeerLost when the peer stalls. One timer for the session costs its messages nothing."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._stall_timeout_s / 4)
            since_s = self._writing_since_s
            if since_s is not None and loop.time() - since_s >= self._stall_timeout_s:
                raise PeerLost(f"the session's peer read nothing for {self._stall_timeout_s:g} s")
