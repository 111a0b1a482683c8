"""The calling end of a session stream: one long-lived bidi stream per peer, all calls multiplexed on it.

    call ──────────────► carrier ══════► peer     a framed connection or a gRPC stream, see `carriers`
    call ◄── mailbox ◄── carrier ◄══════ peer     one mailbox per call

A stream that breaks fails every call waiting on it with PeerLost, at once; the next call opens a new one. Telling the
peer to stop only queues a message: it never waits, so it may stand in any `finally`.

What comes never waits for a caller: one that does not read keeps what it was sent in its own mailbox, which is bounded
by what it asked for, and delays nobody else on the stream.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import grpc

from sagellm_common.core.errors import Cancelled, DeadlineExceeded, PeerLost, SageError
from sagellm_common.rpc.carriers import Carrier, Choice, Deliver, Opener

log = logging.getLogger(__name__)

EARLY_MESSAGES = 256
"""With this many messages to be sent once the stream is open, new calls wait."""

HOLD_S = 0.01
"""What is not urgent waits so long for something that is."""

KeyT = TypeVar("KeyT", bound=Hashable)
RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

OpenCarrier = Callable[[Deliver, Callable[[], None]], Awaitable[Carrier]]


class Mailbox(Generic[ReplyT]):
    """What one call is answered. Replies that came before a failure are still delivered."""

    __slots__ = ("_error", "_listener", "_replies", "_waiter")

    def __init__(self) -> None:
        self._replies: deque[ReplyT] = deque()
        self._listener: Callable[[ReplyT], None] | None = None
        self._error: SageError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, reply: ReplyT) -> None:
        if self._listener is not None:
            self._listener(reply)
            return
        self._replies.append(reply)
        self._wake()

    def listen(self, listener: Callable[[ReplyT], None] | None) -> None:
        """While there is one, replies go to the listener, at once, and `get` gets none."""
        self._listener = listener
        while listener is not None and self._replies:
            listener(self._replies.popleft())

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

    def __init__(
        self, open_carrier: OpenCarrier, split: Callable[[Any], Iterable[tuple[KeyT, ReplyT]]], lost: PeerLost
    ) -> None:
        self._open = open_carrier
        self._split = split
        self._lost = lost
        self._early: list[RequestT] = []
        """Sent before the carrier was there."""
        self._held: list[RequestT] = []
        self._flush_timer: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self.carrier: Carrier | None = None
        self.heard = False
        self.mailboxes: dict[KeyT, Mailbox[ReplyT]] = {}
        self.broken = False
        self.task = asyncio.create_task(self._run(), name=f"session {lost.message}")

    @property
    def full(self) -> bool:
        return len(self._early) >= EARLY_MESSAGES if self.carrier is None else self.carrier.full

    async def room(self, mailbox: Mailbox[ReplyT], timeout_s: float) -> None:
        """Returns when a request may be queued: at once unless the peer reads too slowly.

        Raises PeerLost, DeadlineExceeded, and the failure of `mailbox`, which was abandoned while it waited: its
        cancel is queued already and would not reach what is sent after it.
        """
        if self.full:
            try:
                async with asyncio.timeout(timeout_s):
                    while self.full and not self.broken and not mailbox.failed:
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
        if self._held:
            self.send_later(message)
            self.flush()
        elif self.carrier is None:
            self._early.append(message)
        else:
            self.carrier.send(message)

    def send_later(self, message: RequestT) -> None:
        """With the next message, in one write; HOLD_S later at the latest."""
        self._held.append(message)
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(HOLD_S, self.flush)

    def flush(self) -> None:
        """Sends what was to be sent later."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        held, self._held = self._held, []
        if self.carrier is None:
            self._early += held
        elif held:
            self.carrier.send_all(held)

    async def _run(self) -> None:
        try:
            carrier = await self._open(self._deliver, self._room.set)
            for message in self._early:
                carrier.send(message)
            self._early.clear()
            self.carrier = carrier
            self.heard = self.heard or carrier.name == "framed"  # it was greeted
            self._room.set()
            await carrier.run()
        except SageError as err:
            log.info("%s: %s", self._lost.message, err.message)
            if self.carrier is None:
                self._lost = PeerLost(f"{self._lost.message}: {err.message}", metadata=self._lost.metadata)
        finally:
            self._fail()

    def _deliver(self, message: Any) -> None:
        self.heard = True
        for key, reply in self._split(message):
            if (mailbox := self.mailboxes.get(key)) is not None:  # else nobody waits for it any more
                mailbox.put(reply)

    def _fail(self) -> None:
        self.broken = True
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        self._room.set()
        for mailbox in self.mailboxes.values():
            mailbox.fail(self._lost)


class _Call(Generic[KeyT, RequestT, ReplyT]):
    """One call's mailbox on a stream, and its timer."""

    __slots__ = ("_key", "_mailbox", "_message", "_stream", "_timeout_s", "_timer")

    def __init__(
        self, stream: _Stream[KeyT, RequestT, ReplyT], key: KeyT, message: RequestT, timeout_s: float, what: str
    ) -> None:
        self._stream = stream
        self._key = key
        self._message = message
        self._timeout_s = timeout_s
        self._mailbox = stream.mailboxes[key] = Mailbox()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, timeout_s), _expire, self._mailbox, what, timeout_s)

    async def __aenter__(self) -> Mailbox[ReplyT]:
        try:
            await self._stream.room(self._mailbox, self._timeout_s)
            self._stream.send_soon(self._message)
        except BaseException:
            self._leave()
            raise
        return self._mailbox

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._timer.cancel()
        del self._stream.mailboxes[self._key]


class SessionClient(ABC, Generic[KeyT, RequestT, ReplyT]):
    """Calls to one peer over its current stream, opened on first use and again after it broke.

    `channel` leads to the gRPC server at `address`, which serves `service`. `peer` and `metadata` describe it in
    PeerLost. `KeyT` says which replies belong to which call.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        service: str,
        choice: Choice,
        peer: str,
        metadata: Mapping[str, str],
    ) -> None:
        self._open: OpenCarrier = Opener(channel, address, service, choice).open
        self._peer = peer
        self._metadata = dict(metadata)
        self._stream: _Stream[KeyT, RequestT, ReplyT] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False
        self._heard = False

    async def close(self) -> None:
        """Ends the stream; calls waiting on it fail with PeerLost. Idempotent."""
        self._closed = True
        if self._stream is not None and not self._stream.broken:
            self._stream.flush()
        for task in self._ending:
            task.cancel()
        if self._ending:
            await asyncio.wait(self._ending)

    @property
    def carrier(self) -> str:
        """What carries the session now: framed, grpc, or nothing while it is not open."""
        stream = self._stream
        return stream.carrier.name if stream is not None and stream.carrier is not None and not stream.broken else ""

    @property
    def heard(self) -> bool:
        """The peer could be reached, now or before."""
        if self._stream is not None and self._stream.heard:
            self._heard = True
        return self._heard

    @abstractmethod
    def _split(self, message: Any) -> Iterable[tuple[KeyT, ReplyT]]:
        """The replies in a message, each with the key of its call."""

    def _call(self, key: KeyT, message: RequestT, timeout_s: float, what: str) -> _Call[KeyT, RequestT, ReplyT]:
        """Sends `message`; `async with` gives the mailbox of its replies. One timer bounds the whole call, `what`."""
        stream = self._live_stream()
        if key in stream.mailboxes:
            raise ValueError(f"{what} is already waiting on {self._peer}")
        return _Call(stream, key, message, timeout_s, what)

    def _abandon(self, key: KeyT, what: str) -> None:
        """Ends the call that waits under `key` with Cancelled."""
        self._abandon_with(key, Cancelled(f"{what} was cancelled"))

    def _abandon_with(self, key: KeyT, error: SageError) -> None:
        if self._stream is not None:
            self._stream.abandon(key, error)

    def _send_soon(self, message: RequestT) -> None:
        """Queues a message that nobody answers, on a new stream if there is none: what it undoes outlives a stream."""
        if not self._closed:
            self._live_stream().send_soon(message)

    def _send_if_open(self, message: RequestT) -> None:
        """As `_send_soon`, for what a stream's end undoes anyhow."""
        if self._stream is not None and not self._stream.broken:
            self._stream.send_soon(message)

    def _send_later_if_open(self, message: RequestT) -> None:
        """The same, for what is not urgent: it shares a write with the next message."""
        if self._stream is not None and not self._stream.broken:
            self._stream.send_later(message)

    def _lost(self) -> PeerLost:
        return PeerLost(f"the session with {self._peer} was lost", metadata=self._metadata)

    def _live_stream(self) -> _Stream[KeyT, RequestT, ReplyT]:
        if self._closed:
            raise self._lost()
        if self._stream is None or self._stream.broken:
            self._heard = self.heard
            self._stream = _Stream(self._open, self._split, self._lost())
            self._ending.add(self._stream.task)
            self._stream.task.add_done_callback(self._ending.discard)
        return self._stream


def to_ms(timeout_s: float) -> int:
    """A remaining time as the wire has it, where 0 means none was given."""
    return max(1, int(timeout_s * 1000))


def _expire(mailbox: Mailbox[Any], what: str, timeout_s: float) -> None:
    mailbox.fail(DeadlineExceeded(f"{what} was not done within {timeout_s:.3f} s"))
