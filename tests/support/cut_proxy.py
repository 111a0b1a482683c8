"""A connection's way through somebody who cuts it, or lets it through byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

HOST = "127.0.0.1"


@dataclass
class CutProxy:
    """Forwards to `target`. What comes back ends after `cut_after` bytes of a connection (None: never), `chunk` bytes
    at a time."""

    target: str
    cut_after: int | None = None
    chunk: int = 1 << 16
    address: str = ""
    forwarded: int = 0
    """Bytes that came back on the last connection."""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.split(":")
        upstream, to_upstream = await asyncio.open_connection(host, int(port))
        self._writers |= {writer, to_upstream}
        self.forwarded = 0
        try:
            async with asyncio.TaskGroup() as both:
                back = both.create_task(self._back(upstream, writer))
                there = both.create_task(self._there(reader, to_upstream))
                await asyncio.wait({back, there}, return_when=asyncio.FIRST_COMPLETED)
                back.cancel()
                there.cancel()
        except* OSError:
            pass  # that one side is gone is what these tests are about
        finally:
            writer.transport.abort()
            to_upstream.transport.abort()
            self._writers -= {writer, to_upstream}

    async def _there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            left = self.chunk if self.cut_after is None else min(self.chunk, self.cut_after - self.forwarded)
            if left <= 0 or not (data := await reader.read(left)):
                break
            writer.write(data)
            await writer.drain()
            self.forwarded += len(data)
        writer.close()  # after what is on its way: the receiver gets just these bytes
        await writer.wait_closed()


@asynccontextmanager
async def cut_proxy(target: str, cut_after: int | None = None) -> AsyncIterator[CutProxy]:
    proxy = CutProxy(target, cut_after)
    server = await asyncio.start_server(proxy.serve, HOST, 0)
    proxy.address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for writer in list(proxy._writers):
            writer.transport.abort()
