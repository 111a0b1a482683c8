"""The sending half of a session stream: many requests, one writer, one message per wake-up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from sagellm_common.core.errors import PeerLost

M = TypeVar("M")

STALL_TIMEOUT_S = 10.0


class SessionWriter(Generic[M]):
    """Sends what was added to `message`, all of it together: what one engine step adds leaves in one message.

    Adding never waits, so the engine's steps never wait for a peer. The backlog is bounded in time: a peer that takes
    no message for `stall_timeout_s` ends the session with PeerLost.
    """

    def __init__(
        self,
        new_message: Callable[[], M],
        write: Callable[[M], Awaitable[None]],
        *,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._new_message = new_message
        self._write = write
        self._stall_timeout_s = stall_timeout_s
        self._next: M | None = None
        self._writing_since_s: float | None = None
        self._wake = asyncio.Event()
        self._closed = False

    @property
    def message(self) -> M:
        """The message that leaves next. Add to it at once, on the event loop: it leaves when the caller waits."""
        if self._next is None:
            self._next = self._new_message()
            self._wake.set()
        return self._next

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
