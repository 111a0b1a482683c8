"""The calling end of a session stream: one long-lived bidi stream per peer, all calls multiplexed on it.

    call ──► outbox ──► writer task ══════► peer
    call ◄── mailbox ◄── reader task ◄═════ peer     one mailbox per call

A stream that breaks fails every call waiting on it with PeerLost, at once; the next call opens a new one. Telling the
peer to stop only queues a message: it never waits, so it may stand in any `finally`.

The reader never waits for a caller: one that does not read keeps what it was sent in its own mailbox, which is bounded
by what it asked for, and delays nobody else on the stream.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import grpc

from sagellm_common.core.errors import Cancelled, DeadlineExceeded, PeerLost, SageError
from sagellm_common.rpc.status import from_rpc_error

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 256
"""Beyond this many unsent messages new calls wait; the peer is not reading."""

KeyT = TypeVar("KeyT", bound=Hashable)
RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


class Mailbox(Generic[ReplyT]):
    """What one call is answered. Replies that came before a failure are still delivered."""

    __slots__ = ("_error", "_replies", "_waiter")

    def __init__(self) -> None:
        self._replies: deque[ReplyT] = deque()
        self._error: SageError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, reply: ReplyT) -> None:
        self._replies.append(reply)
        self._wake()

    def fail(self, error: SageError) -> None:
        """The first failure counts."""
        self._error = self._error or error
        self._wake()

    async def get(self) -> ReplyT:
        """The next reply. Raises the failure once the replies before it are read."""
        while not self._replies:
            self.check()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._replies.popleft()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Stream(Generic[KeyT, RequestT, ReplyT]):
    """One life of a stream. Once broken it stays broken."""

    def __init__(self, call: Any, split: Callable[[Any], Iterable[tuple[KeyT, ReplyT]]], lost: PeerLost) -> None:
        self._call = call
        self._split = split
        self._lost = lost
        self._outbox: deque[RequestT] = deque()
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self.mailboxes: dict[KeyT, Mailbox[ReplyT]] = {}
        self.broken = False
        self.task = asyncio.create_task(self._run(), name=f"session {lost.message}")

    async def room(self, mailbox: Mailbox[ReplyT], timeout_s: float) -> None:
        """Returns when a request may be queued: at once unless the peer reads too slowly.

        Raises PeerLost, DeadlineExceeded, and the failure of `mailbox`, which was abandoned while it waited: its
        cancel is queued already and would not reach what is sent after it.
        """
        if len(self._outbox) >= OUTBOX_MESSAGES:
            try:
                async with asyncio.timeout(timeout_s):
                    while len(self._outbox) >= OUTBOX_MESSAGES and not self.broken and not mailbox.failed:
                        self._room.clear()
                        await self._room.wait()
            except TimeoutError:
                raise DeadlineExceeded("the peer took no new requests until the deadline") from None
        if self.broken:
            raise self._lost
        mailbox.check()

    def abandon(self, key: KeyT, error: SageError) -> None:
        """Ends a waiting call with `error`, whatever the peer does."""
        if (mailbox := self.mailboxes.get(key)) is not None:
            mailbox.fail(error)
            self._room.set()

    def send_soon(self, message: RequestT) -> None:
        """Queues a message at once, beyond the bound if need be: cancel and release do not wait for room."""
        self._outbox.append(message)
        self._work.set()

    def _fail(self, error: SageError) -> None:
        self.broken = True
        self._room.set()
        for mailbox in self.mailboxes.values():
            mailbox.fail(error)

    async def _run(self) -> None:
        writer = asyncio.create_task(self._write(), name="session writer")
        try:
            async for message in self._call:
                for key, reply in self._split(message):
                    if (mailbox := self.mailboxes.get(key)) is not None:  # else nobody waits for it any more
                        mailbox.put(reply)
        except grpc.aio.AioRpcError as err:
            log.info("%s: %s", self._lost.message, from_rpc_error(err).message)
        finally:
            self._fail(self._lost)
            writer.cancel()
            self._call.cancel()
            await asyncio.wait([writer])

    async def _write(self) -> None:
        """The only writer: concurrent writes on one gRPC stream are an error."""
        try:
            while True:
                await self._work.wait()
                while self._outbox:
                    message = self._outbox.popleft()
                    self._room.set()
                    await self._call.write(message)
                self._work.clear()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._call.cancel()  # the reader learns why and fails the calls


class SessionClient(ABC, Generic[KeyT, RequestT, ReplyT]):
    """Calls to one peer over its current stream, opened on first use and again after it broke.

    `peer` and `metadata` describe it in PeerLost. `KeyT` says which replies belong to which call.
    """

    def __init__(self, open_call: Callable[[], Any], peer: str, metadata: Mapping[str, str]) -> None:
        self._open_call = open_call
        self._peer = peer
        self._metadata = dict(metadata)
        self._stream: _Stream[KeyT, RequestT, ReplyT] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def close(self) -> None:
        """Ends the stream; calls waiting on it fail with PeerLost. Idempotent."""
        self._closed = True
        for task in self._ending:
            task.cancel()
        if self._ending:
            await asyncio.wait(self._ending)

    @abstractmethod
    def _split(self, message: Any) -> Iterable[tuple[KeyT, ReplyT]]:
        """The replies in a message, each with the key of its call."""

    @asynccontextmanager
    async def _call(self, key: KeyT, message: RequestT, timeout_s: float, what: str) -> AsyncIterator[Mailbox[ReplyT]]:
        """Sends `message` and yields the mailbox of its replies. One timer bounds the whole call, `what`."""
        stream = self._live_stream()
        if key in stream.mailboxes:
            raise ValueError(f"{what} is already waiting on {self._peer}")
        mailbox = stream.mailboxes[key] = Mailbox()
        timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), _expire, mailbox, what, timeout_s)
        try:
            await stream.room(mailbox, timeout_s)
            stream.send_soon(message)
            yield mailbox
        finally:
            timer.cancel()
            del stream.mailboxes[key]

    def _abandon(self, key: KeyT, what: str) -> None:
        """Ends the call that waits under `key` with Cancelled."""
        if self._stream is not None:
            self._stream.abandon(key, Cancelled(f"{what} was cancelled"))

    def _send_soon(self, message: RequestT) -> None:
        """Queues a message that nobody answers, on a new stream if there is none: what it undoes outlives a stream."""
        if not self._closed:
            self._live_stream().send_soon(message)

    def _send_if_open(self, message: RequestT) -> None:
        """As `_send_soon`, for what a stream's end undoes anyhow."""
        if self._stream is not None and not self._stream.broken:
            self._stream.send_soon(message)

    def _lost(self) -> PeerLost:
        return PeerLost(f"the session with {self._peer} was lost", metadata=self._metadata)

    def _live_stream(self) -> _Stream[KeyT, RequestT, ReplyT]:
        if self._closed:
            raise self._lost()
        if self._stream is None or self._stream.broken:
            self._stream = _Stream(self._open_call(), self._split, self._lost())
            self._ending.add(self._stream.task)
            self._stream.task.add_done_callback(self._ending.discard)
        return self._stream


def to_ms(timeout_s: float) -> int:
    """A remaining time as the wire has it, where 0 means none was given."""
    return max(1, int(timeout_s * 1000))


def _expire(mailbox: Mailbox[Any], what: str, timeout_s: float) -> None:
    mailbox.fail(DeadlineExceeded(f"{what} was not done within {timeout_s:.3f} s"))
