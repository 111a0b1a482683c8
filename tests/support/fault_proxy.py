"""A TCP proxy in this process that fails on demand, as networks and peers do."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress

CHUNK_BYTES = 64 << 10


class FaultProxy:
    """One address in front of another. Its methods take effect at once, and may be called from any thread."""

    def __init__(self, target: str) -> None:
        self._target = target.rsplit(":", 1)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._corruption: tuple[random.Random, float] | None = None
        self._trigger: tuple[int, Callable[[], None]] | None = None
        self.corrupted = 0
        """Chunks that were changed on their way to clients."""

    async def start(self) -> str:
        """host:port for clients."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def close(self) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    # ---- faults ----

    def cut(self) -> None:
        """As if the process behind it was killed: connections are reset, new ones too."""

        def act() -> None:
            self._refusing = True
            for link in self._links:
                link.abort()

        self._now(act)

    def stall(self, for_s: float | None = None) -> None:
        """As if the process was stopped, or a firewall dropped all packets: nothing moves, nobody is told.

        Until `heal`, or for so many seconds.
        """

        def act() -> None:
            self._flowing.clear()
            if for_s is not None:
                self._loop.call_later(for_s, self._flowing.set)

        self._now(act)

    def half_close(self) -> None:
        """Clients are told that no more comes, while what they send is still taken."""

        def act() -> None:
            for link in self._links:
                link.half_close()

        self._now(act)

    def corrupt(self, rng: random.Random, rate: float) -> None:
        """From now on a byte of this share of the chunks that go to clients is another one."""
        self._corruption = rng, rate

    def after_bytes(self, count: int, action: Callable[[], None]) -> None:
        """Calls `action` once when `count` more bytes have gone to clients, before the next one does."""
        self._trigger = count, action

    def heal(self) -> None:
        """New connections work; what was held up arrives now, late."""

        def act() -> None:
            self._refusing, self._corruption, self._trigger = False, None, None
            self._flowing.set()

        self._now(act)

    def _now(self, act: Callable[[], None]) -> None:
        if threading.get_ident() == self._thread:
            act()
            return

        async def there() -> None:
            act()

        asyncio.run_coroutine_threadsafe(there(), self._loop).result(10.0)

    # ---- moving bytes ----

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._refusing:
                return
            # `close` cancels; start_server would report that as an error.
            with suppress(OSError, asyncio.CancelledError):
                there_reader, link.server = await asyncio.open_connection(*self._target)
                upstream = asyncio.create_task(self._pump(reader, link.server, to_client=False))
                try:
                    await self._pump(there_reader, writer, to_client=True, link=link)
                    await upstream
                finally:
                    upstream.cancel()
                    await asyncio.wait([upstream])
        finally:
            self._links.discard(link)
            link.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_client: bool, link: _Link | None = None
    ) -> None:
        with suppress(OSError):
            while True:
                data = await reader.read(CHUNK_BYTES)
                await self._flowing.wait()
                if to_client and data:
                    data = await self._triggered(self._corrupted(data), writer)
                if link is not None and link.half_closed:
                    if not data:
                        return
                    continue
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

    def _corrupted(self, data: bytes) -> bytes:
        if self._corruption is None:
            return data
        rng, rate = self._corruption
        if rng.random() >= rate:
            return data
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        self.corrupted += 1
        return bytes(changed)

    async def _triggered(self, data: bytes, writer: asyncio.StreamWriter) -> bytes:
        """What is left to send once the trigger, if it lies within, has gone off at its byte."""
        if self._trigger is None:
            return data
        left, action = self._trigger
        if left > len(data):
            self._trigger = left - len(data), action
            return data
        self._trigger = None
        writer.write(data[:left])
        with suppress(OSError):
            await writer.drain()
        action()
        await self._flowing.wait()
        return data[left:]


class _Link:
    """One connection, from the client and to the server."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.half_closed = False

    def abort(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()

    def half_close(self) -> None:
        if not self.half_closed and self.server is not None and self.client.can_write_eof():
            self.half_closed = True
            with suppress(OSError, RuntimeError):
                self.client.write_eof()
