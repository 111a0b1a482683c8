"""The sending half of a session stream: many requests, one writer, one message per wake-up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from sagellm_common.core.errors import PeerLost

T = TypeVar("T")
M = TypeVar("M")

STALL_TIMEOUT_S = 10.0


class SessionWriter(Generic[T, M]):
    """Sends what was `put`, all of it that waits in one message: what one engine step puts leaves together.

    `put` never waits, so the engine's steps never wait for a peer. The backlog is bounded in time: a peer that takes
    no message for `stall_timeout_s` ends the session with PeerLost.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[T]], M],
        write: Callable[[M], Awaitable[None]],
        *,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._encode = encode
        self._write = write
        self._stall_timeout_s = stall_timeout_s
        self._items: list[T] = []
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, item: T) -> None:
        """On the event loop."""
        self._items.append(item)
        self._wake.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[asyncio.TaskGroup]:
        """A task group for the session's requests, with the writer beside it.

        Leaving the block waits for the requests and until everything is sent. When the stream ends otherwise, all
        requests are cancelled. Raises PeerLost when the peer stalls.
        """
        try:
            async with asyncio.TaskGroup() as stream:
                stream.create_task(self.run(), name="session-writer")
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
        """Until `close`. Raises PeerLost when the peer stalls."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            items, self._items = self._items, []
            if items:
                try:
                    async with asyncio.timeout(self._stall_timeout_s):
                        await self._write(self._encode(items))
                except TimeoutError:
                    raise PeerLost(f"the session's peer read nothing for {self._stall_timeout_s:g} s") from None
            if self._closed and not self._items:
                return
