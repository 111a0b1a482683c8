"""The router's end of the session streams: one long-lived bidi stream per worker, all requests multiplexed on it.

    call ──► outbox ──► writer task ══════► worker
    call ◄── mailbox ◄── reader task ◄═════ worker     one mailbox per (request_id, attempt)

A stream that breaks fails every call waiting on it with PeerLost, at once; the next call opens a new one. Cancelling
and releasing only queue a message: they never wait, so they may stand in any `finally`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from sagellm_common.core.errors import Cancelled, DeadlineExceeded, EngineFailed, PeerLost, SageError
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import (
    FinishReason,
    GenerationRequest,
    HandoffTicket,
    KvSource,
    TokenLogprob,
    pack_int32,
)
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.status import from_rpc_error, from_status

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 256
"""Beyond this many unsent messages new calls wait; the peer is not reading."""

Key = tuple[str, str, int]
"""(operation, request_id, attempt)"""
RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What the prefill worker answers: the first token, and where the prompt's KV can be pulled from.

    No source when `finish_reason` is set: nothing is left to decode.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    source: KvSource | None
    cached_tokens: int
    store_tokens: int
    queue_ms: float
    compute_ms: float
    store_fetch_ms: float


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What the decode worker pulled."""

    bytes: int
    transfer_ms: float
    blocks: int
    blocks_reused: int
    backend: str


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Tokens `index, index + 1, …` of one generation, as one engine step gave them."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    transfer: TransferReport | None


class _Mailbox(Generic[ReplyT]):
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


class _Stream(Generic[RequestT, ReplyT]):
    """One life of a stream. Once broken it stays broken."""

    def __init__(self, call: Any, deliver: Callable[[_Stream[RequestT, ReplyT], Any], None], lost: PeerLost) -> None:
        self._call = call
        self._deliver = deliver
        self._lost = lost
        self._outbox: deque[RequestT] = deque()
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self.mailboxes: dict[Key, _Mailbox[ReplyT]] = {}
        self.broken = False
        self.task = asyncio.create_task(self._run(), name=f"session {lost.metadata['worker_id']}")

    async def room(self, mailbox: _Mailbox[ReplyT], timeout_s: float) -> None:
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
                raise DeadlineExceeded("the worker took no new requests until the deadline") from None
        if self.broken:
            raise self._lost
        mailbox.check()

    def abandon(self, key: Key, error: SageError) -> None:
        """Ends a waiting call with `error`, whatever the worker does."""
        if (mailbox := self.mailboxes.get(key)) is not None:
            mailbox.fail(error)
            self._room.set()

    def send_soon(self, message: RequestT) -> None:
        """Queues a message at once, beyond the bound if need be: cancel and release do not wait for room."""
        self._outbox.append(message)
        self._work.set()

    def fail(self, error: SageError) -> None:
        self.broken = True
        self._room.set()
        for mailbox in self.mailboxes.values():
            mailbox.fail(error)

    async def _run(self) -> None:
        writer = asyncio.create_task(self._write(), name="session writer")
        try:
            async for message in self._call:
                self._deliver(self, message)
        except grpc.aio.AioRpcError as err:
            log.info("%s: %s", self._lost.message, from_rpc_error(err).message)
        finally:
            self.fail(self._lost)
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


class _Session(ABC, Generic[RequestT, ReplyT]):
    """Calls to one worker over its current stream, opened on first use and again after it broke."""

    def __init__(self, open_call: Callable[[], Any], worker_id: str, address: str) -> None:
        self._open_call = open_call
        self._worker_id = worker_id
        self._address = address
        self._stream: _Stream[RequestT, ReplyT] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def close(self) -> None:
        """Ends the stream; calls waiting on it fail with PeerLost. Idempotent."""
        self._closed = True
        for task in self._ending:
            task.cancel()
        if self._ending:
            await asyncio.wait(self._ending)

    def _deliver(self, stream: _Stream[RequestT, ReplyT], message: Any) -> None:
        """Puts the parts of a message into their mailboxes; nobody waits any more for those without one."""
        for operation, reply in self._split(message):
            mailbox = stream.mailboxes.get((operation, reply.request_id, reply.attempt))  # type: ignore[attr-defined]
            if mailbox is not None:
                mailbox.put(reply)

    @abstractmethod
    def _split(self, message: Any) -> Iterable[tuple[str, ReplyT]]:
        """The replies in a message, each with its operation."""

    def _lost(self) -> PeerLost:
        return PeerLost(
            f"the session with worker {self._worker_id} at {self._address} was lost",
            metadata={"worker_id": self._worker_id, "address": self._address},
        )

    def _live_stream(self) -> _Stream[RequestT, ReplyT]:
        if self._closed:
            raise self._lost()
        if self._stream is None or self._stream.broken:
            self._stream = _Stream(self._open_call(), self._deliver, self._lost())
            self._ending.add(self._stream.task)
            self._stream.task.add_done_callback(self._ending.discard)
        return self._stream

    @asynccontextmanager
    async def _call(self, key: Key, message: RequestT, timeout_s: float) -> AsyncIterator[_Mailbox[ReplyT]]:
        """Sends `message` and yields the mailbox of its replies. One timer bounds the whole call."""
        stream = self._live_stream()
        if key in stream.mailboxes:
            raise ValueError(f"{key} is already waiting on worker {self._worker_id}")
        mailbox = stream.mailboxes[key] = _Mailbox()
        timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), mailbox.fail, _too_late(key, timeout_s))
        try:
            await stream.room(mailbox, timeout_s)
            stream.send_soon(message)
            yield mailbox
        finally:
            timer.cancel()
            del stream.mailboxes[key]

    def _abandon(self, key: Key) -> None:
        if self._stream is not None:
            self._stream.abandon(key, Cancelled(f"request {key[1]} was cancelled"))

    def _send_soon(self, message: RequestT) -> None:
        if not self._closed:
            self._live_stream().send_soon(message)


class PrefillSession(_Session[worker_pb2.PrefillSessionRequest, worker_pb2.PrefillResult]):
    def __init__(self, channel: grpc.aio.Channel, worker_id: str, address: str) -> None:
        super().__init__(worker_pb2_grpc.PrefillServiceStub(channel).Session, worker_id, address)

    async def prefill(
        self, request: GenerationRequest, attempt: int, ticket: HandoffTicket, *, timeout_s: float
    ) -> PrefillOutcome:
        """Raises what the worker answers, PeerLost, DeadlineExceeded, Cancelled."""
        message = worker_pb2.PrefillRequest(
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=pack_int32(request.prompt_token_ids),
            sampling=codec.encode_sampling(request.sampling),
            ticket=codec.encode_ticket(ticket),
            cache_salt=request.cache_salt,
            timeout_ms=_ms(timeout_s),
            trace_context=current_carrier(),
        )
        key = ("prefill", request.request_id, attempt)
        async with self._call(key, worker_pb2.PrefillSessionRequest(prefill=message), timeout_s) as replies:
            result = await replies.get()
        if result.HasField("error"):
            raise from_status(result.error)
        return _decode_prefill(result.response)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Tells the worker to drop the request and any KV pinned for it. A no-op for what it does not know."""
        self._abandon(("prefill", request_id, attempt))
        cancel = worker_pb2.CancelRequest(request_id=request_id, attempt=attempt)
        self._send_soon(worker_pb2.PrefillSessionRequest(cancel=cancel))

    def _split(self, message: worker_pb2.PrefillSessionResponse) -> Iterable[tuple[str, worker_pb2.PrefillResult]]:
        return (("prefill", result) for result in message.results)


class DecodeSession(_Session[worker_pb2.DecodeSessionRequest, Any]):
    def __init__(self, channel: grpc.aio.Channel, worker_id: str, address: str) -> None:
        super().__init__(worker_pb2_grpc.DecodeServiceStub(channel).Session, worker_id, address)

    async def reserve(self, request: GenerationRequest, attempt: int, *, timeout_s: float) -> HandoffTicket:
        """Raises what the worker answers (KvExhausted, Draining, …), PeerLost, DeadlineExceeded, Cancelled."""
        message = worker_pb2.ReserveRequest(
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=pack_int32(request.prompt_token_ids),
            max_new_tokens=request.sampling.max_new_tokens,
            cache_salt=request.cache_salt,
            timeout_ms=_ms(timeout_s),
            trace_context=current_carrier(),
        )
        key = ("reserve", request.request_id, attempt)
        async with self._call(key, worker_pb2.DecodeSessionRequest(reserve=message), timeout_s) as replies:
            result = await replies.get()
        if result.HasField("error"):
            raise from_status(result.error)
        return codec.decode_ticket(result.response.ticket)

    async def decode(
        self,
        request: GenerationRequest,
        attempt: int,
        emitted: Sequence[int],
        source: KvSource | None,
        *,
        timeout_s: float,
    ) -> AsyncGenerator[DecodeStep, None]:
        """The steps of one generation after `emitted`; the last has finish_reason. Iterate under `aclosing`.

        Without a source the worker computes prompt and emitted tokens itself. Raises as `reserve` does, and
        LeaseExpired, KvCorrupt, EngineFailed.
        """
        message = worker_pb2.DecodeRequest(
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=pack_int32(request.prompt_token_ids),
            emitted_token_ids=pack_int32(emitted),
            sampling=codec.encode_sampling(request.sampling),
            source=codec.encode_kv_source(source) if source else None,
            cache_salt=request.cache_salt,
            timeout_ms=_ms(timeout_s),
            trace_context=current_carrier(),
        )
        key = ("decode", request.request_id, attempt)
        async with self._call(key, worker_pb2.DecodeSessionRequest(decode=message), timeout_s) as replies:
            finished = False
            while not finished:
                reply = await replies.get()
                step = _decode_step(reply)
                finished = step.finish_reason is not None
                if step.finish_reason is not FinishReason.ERROR:
                    yield step
                    continue
                if step.token_ids:
                    yield DecodeStep(step.index, step.token_ids, step.logprobs, None, step.transfer)
                raise (
                    from_status(reply.error)
                    if reply.HasField("error")
                    else EngineFailed(f"worker {self._worker_id} failed without saying why")
                )

    def cancel(self, request_id: str, attempt: int) -> None:
        """Tells the worker to stop generating. A no-op for what it does not know."""
        self._abandon(("decode", request_id, attempt))
        cancel = worker_pb2.CancelRequest(request_id=request_id, attempt=attempt)
        self._send_soon(worker_pb2.DecodeSessionRequest(cancel=cancel))

    def release(self, request_id: str, attempt: int) -> None:
        """Gives reserved blocks back. A no-op for what the worker does not know or decodes already."""
        self._abandon(("reserve", request_id, attempt))
        release = worker_pb2.ReleaseReservationRequest(request_id=request_id, attempt=attempt)
        self._send_soon(worker_pb2.DecodeSessionRequest(release=release))

    def renew(self, request_id: str, attempt: int) -> None:
        """Keeps a reservation alive. A no-op for what the worker does not hold (any more)."""
        renew = worker_pb2.RenewReservationRequest(request_id=request_id, attempt=attempt)
        self._send_soon(worker_pb2.DecodeSessionRequest(renew=renew))

    def _split(self, message: worker_pb2.DecodeSessionResponse) -> Iterable[tuple[str, Any]]:
        yield from (("decode", output) for output in message.outputs)
        yield from (("reserve", result) for result in message.reservations)


def _decode_prefill(response: worker_pb2.PrefillResponse) -> PrefillOutcome:
    return PrefillOutcome(
        token_ids=tuple(codec.decode_token_ids(response.token_ids).tolist()),
        logprobs=codec.decode_logprobs(response.logprobs),
        finish_reason=codec.decode_finish_reason(response.finish_reason),
        source=codec.decode_kv_source(response.source) if response.HasField("source") else None,
        cached_tokens=response.cached_tokens,
        store_tokens=response.store_tokens,
        queue_ms=response.queue_ms,
        compute_ms=response.compute_ms,
        store_fetch_ms=response.store_fetch_ms,
    )


def _decode_step(response: worker_pb2.DecodeResponse) -> DecodeStep:
    transfer = response.transfer if response.HasField("transfer") else None
    return DecodeStep(
        index=response.index,
        token_ids=tuple(codec.decode_token_ids(response.token_ids).tolist()),
        logprobs=codec.decode_logprobs(response.logprobs),
        finish_reason=codec.decode_finish_reason(response.finish_reason),
        transfer=TransferReport(
            transfer.bytes, transfer.transfer_ms, transfer.blocks, transfer.blocks_reused, transfer.backend
        )
        if transfer
        else None,
    )


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _too_late(key: Key, timeout_s: float) -> DeadlineExceeded:
    operation, request_id, _ = key
    return DeadlineExceeded(f"{operation} of request {request_id} was not done within {timeout_s:.3f} s")
