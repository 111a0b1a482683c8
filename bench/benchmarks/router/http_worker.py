"""A mock worker of the OpenAI API: `python -m bench.benchmarks.router.http_worker --interval-ms 10`."""

from __future__ import annotations

import argparse
import asyncio
import json

import uvloop

from bench.benchmarks.router.http_parts import HttpReader, write
from bench.benchmarks.router.pace import Pace

_EVENT = b'data: {"id":"c","object":"text_completion","choices":[{"index":0,"text":" x","finish_reason":null}]}\n\n'
_END = b"data: [DONE]\n\n"
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_ABOUT = {
    "object": "list",
    "data": [{"id": "mock", "object": "model"}],
    "model_path": "mock",
    "status": "ok",
}


class Worker(asyncio.Protocol):
    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._reader = HttpReader(self._request)
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._pace.cancel(self)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)

    def _request(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"POST"):
            self._json(_ABOUT)
            return
        asked = json.loads(body)
        if not asked.get("stream"):
            self._json({"id": "c", "choices": [{"index": 0, "text": " x"}]})
            return
        write(self._transport, _STREAM)
        self._pace.submit(self, 0, asked["max_tokens"], self._token)

    def _token(self, index: int, last: bool) -> None:
        data = _EVENT + (_END if last else b"")
        write(self._transport, b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if last else b""))

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        write(
            self._transport,
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body),
        )


async def serve(interval_s: float) -> None:
    pace = Pace(interval_s)
    server = await asyncio.get_running_loop().create_server(lambda: Worker(pace), "127.0.0.1", 0)
    print(json.dumps({"address": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--interval-ms", type=float, required=True)
    uvloop.run(serve(parser.parse_args().interval_ms / 1e3))
