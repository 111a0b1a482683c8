"""The least that a proxy in Python does: `python -m bench.benchmarks.router.proxy HOST:PORT`. Bytes, no features."""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

from bench.benchmarks.router.http_parts import write


class _Half(asyncio.Protocol):
    def __init__(self, other: _Half | None = None) -> None:
        self.other = other
        self.transport: asyncio.BaseTransport | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        for data in self._early:
            write(transport, data)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self.other.send(data)

    def send(self, data: bytes) -> None:
        if self.transport is None:
            self._early.append(data)
        else:
            write(self.transport, data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Client(_Half):
    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._host, self._port = host, port
        self._connecting: asyncio.Task[object] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.other = worker = _Half(self)
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(loop.create_connection(lambda: worker, self._host, self._port))


async def serve(backend: str) -> None:
    host, port = backend.rsplit(":", 1)
    server = await asyncio.get_running_loop().create_server(lambda: _Client(host, int(port)), "127.0.0.1", 0)
    print(json.dumps({"address": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
