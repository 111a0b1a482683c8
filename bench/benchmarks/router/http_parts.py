"""HTTP/1.1 as far as the mock worker and its client speak it: bodies by content-length or in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast


class HttpReader:
    """Cuts a stream into messages: `take` gets (head, body) of each whole one.

    `on_body` hears bytes of a body as they come.
    """

    def __init__(self, take: Callable[[bytes, bytes], None], on_body: Callable[[bytes], None] | None = None) -> None:
        self._take = take
        self._on_body = on_body
        self._buffer = bytearray()
        self._seen = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data
        while (head_end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, begin = bytes(self._buffer[:head_end]), head_end + 4
            if self._on_body is not None and len(self._buffer) > max(begin, self._seen):
                self._on_body(bytes(self._buffer[max(begin, self._seen) :]))
                self._seen = len(self._buffer)
            lower = head.lower()
            if b"transfer-encoding: chunked" in lower:
                end = self._buffer.find(b"0\r\n\r\n", begin)
                while end >= 0 and end > begin and self._buffer[end - 2 : end] != b"\r\n":
                    end = self._buffer.find(b"0\r\n\r\n", end + 1)
                if end < 0:
                    return
                end += 5
            else:
                at = lower.find(b"content-length:")
                length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
                end = begin + length
                if len(self._buffer) < end:
                    return
            body = bytes(self._buffer[begin:end])
            del self._buffer[:end]
            self._seen = 0
            self._take(head, body)


def write(transport: asyncio.BaseTransport | None, data: bytes) -> None:
    cast(asyncio.Transport, transport).write(data)
