"""One HTTP exchange: what was sent of the answer, and whether the client is still there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from pydantic_core import to_json
from starlette.types import Message, Receive, Send

from services.gateway.errors import HttpError

_BODY_TIMEOUT_S = 30.0
_STALL_TIMEOUT_S = 60.0
"""A client that reads nothing for so long is taken for gone."""
_DISCARD_FACTOR = 8
"""A body over the limit is read on, without keeping it, up to so many limits: a client that is still sending would
see a broken connection instead of the 413."""


class Disconnected(Exception):
    """The client went away, or stopped reading, before the answer was complete."""


class Exchange:
    """Sends one answer, each piece as one write."""

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self._receive = receive
        self._send = send
        self.request_id = request_id
        self.tenant = ""
        self.service_class = ""
        self.status = 0
        self.complete = False
        self.streaming = False

    @property
    def started(self) -> bool:
        return self.status != 0

    async def send(self, message: Message) -> None:
        """The ASGI send: remembers what went out, and names the request. Raises Disconnected for a stalled client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.request_id.encode())]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        try:
            async with asyncio.timeout(_STALL_TIMEOUT_S):
                await self._send(message)
        except TimeoutError:
            raise Disconnected from None

    async def send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = to_json(body)
        fields = {"content-type": "application/json", "content-length": str(len(content))} | (headers or {})
        await self.send({"type": "http.response.start", "status": status, "headers": _encoded(fields)})
        await self.send({"type": "http.response.body", "body": content})

    async def send_events(self, events: list[Any], last: bool = False) -> None:
        """Server-sent events, in one write; with the first the status goes out. `last` ends the stream."""
        if not self.started:
            self.streaming = True
            fields = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            await self.send({"type": "http.response.start", "status": 200, "headers": _encoded(fields)})
        body = b"".join([b"data: " + (e if isinstance(e, bytes) else to_json(e)) + b"\n\n" for e in events])
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})

    async def send_error(self, err: HttpError) -> None:
        """As the whole answer, or as the last event of a stream under way. A client that has left misses it."""
        with contextlib.suppress(Disconnected):
            if not self.started:
                await self.send_json(err.status, err.body(), dict(err.headers))
            elif self.streaming and not self.complete:
                await self.send_events([err.body()], last=True)

    async def read_body(self, limit_bytes: int) -> bytes:
        """Raises HttpError 413 and 408, Disconnected."""
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                more = True
                while more and size <= limit_bytes * _DISCARD_FACTOR:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= limit_bytes:
                        chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise HttpError(408, f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} s", "timeout") from None
        if size > limit_bytes:
            text = f"the body has more than {limit_bytes} bytes, the limit of gateway.max_body_bytes"
            raise HttpError(413, text, "request_too_large", headers={"connection": "close"})
        return b"".join(chunks)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, and cancels it when the client leaves. Raises Disconnected, or what `work` raises."""
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch())
                await work
                watch.cancel()
        except BaseExceptionGroup as failures:
            raise first_leaf(failures) from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.complete:  # after the answer the server says the same
            raise Disconnected


def first_leaf(err: BaseException) -> BaseException:
    """The first error of a task group; the others followed from it."""
    while isinstance(err, BaseExceptionGroup):
        err = err.exceptions[0]
    return err


def _encoded(fields: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in fields.items()]
