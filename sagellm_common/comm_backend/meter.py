"""What one pull tells about itself while bytes arrive; byte paths report to the meter of whoever asked for the pull.

    with metering() as meter:
        await channel.pull(...)      # within: `current()` on the event loop, handed to threads by the byte path

A byte path that reports nothing is measured from outside, as one arrival. What sources spend on digests is summed up by
thread: `digested`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

STALL_S = 0.1
"""A piece that lets itself be waited for longer is a stall."""


class PullMeter:
    """One thread reports at a time."""

    __slots__ = (
        "_last_s",
        "began_s",
        "bytes",
        "digest_s",
        "first_byte_s",
        "longest_stall_s",
        "messages_saved",
        "stalls",
    )

    def __init__(self) -> None:
        self.began_s = self._last_s = time.monotonic()
        self.bytes = 0
        self.first_byte_s: float | None = None
        """Seconds from the beginning until the first piece was here."""
        self.messages_saved = 0
        """By sending blocks together."""
        self.stalls = 0
        self.longest_stall_s = 0.0
        self.digest_s = 0.0

    def arrived(self, num_bytes: int, num_blocks: int = 1) -> None:
        """A piece is here, of so many blocks."""
        now = time.monotonic()
        if self.first_byte_s is None:
            self.first_byte_s = now - self.began_s
        if now - self._last_s > STALL_S:
            self.stalls += 1
            self.longest_stall_s = max(self.longest_stall_s, now - self._last_s)
        self._last_s = now
        self.bytes += num_bytes
        self.messages_saved += num_blocks - 1

    def waited(self) -> None:
        """The source said that it has nothing to send yet: that is no stall."""
        self._last_s = time.monotonic()

    @contextmanager
    def digesting(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.digest_s += time.perf_counter() - began_s

    def add(self, part: PullMeter) -> None:
        """One of several pulls of the same handoff."""
        if self.first_byte_s is None and part.first_byte_s is not None:
            self.first_byte_s = part.began_s - self.began_s + part.first_byte_s
        self.bytes += part.bytes
        self.messages_saved += part.messages_saved
        self.stalls += part.stalls
        self.longest_stall_s = max(self.longest_stall_s, part.longest_stall_s)
        self.digest_s += part.digest_s


class _Sending(threading.local):
    digest_s = 0.0


_sending = _Sending()


def digested(seconds: float) -> None:
    """A source has taken digests, on the thread that holds the blocks under their lease."""
    _sending.digest_s += seconds


@contextmanager
def source_digesting() -> Iterator[None]:
    """A source takes digests for the time of the block."""
    began_s = time.perf_counter()
    try:
        yield
    finally:
        digested(time.perf_counter() - began_s)


def digested_s() -> float:
    """Since this thread began to hold the blocks that it sends."""
    return _sending.digest_s


def begin_sending() -> None:
    _sending.digest_s = 0.0


_current: ContextVar[PullMeter | None] = ContextVar("pull_meter", default=None)


def current() -> PullMeter:
    """The meter of the pull under way; one that nobody reads outside of any."""
    return _current.get() or PullMeter()


class metering(AbstractContextManager[PullMeter]):  # used as a function
    """A meter for the time of the block, added to the one outside of it, if there is one, whatever ends the block."""

    __slots__ = ("_meter", "_outer", "_token")

    def __enter__(self) -> PullMeter:
        self._outer, self._meter = _current.get(), PullMeter()
        self._token = _current.set(self._meter)
        return self._meter

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        if self._outer is not None:
            self._outer.add(self._meter)
