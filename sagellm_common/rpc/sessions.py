"""The router's end of its workers' session streams, on `session_client`: a call is (operation, request_id, attempt)."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Required, TypedDict, Unpack

import grpc

from sagellm_common.core.errors import EngineFailed, SageError
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import (
    AT_HAND,
    FinishReason,
    GenerationRequest,
    HandoffTicket,
    KvConversion,
    KvOrigins,
    KvPeer,
    KvSource,
    TokenLogprob,
    pack_int32,
)
from sagellm_common.rpc import codec
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2, inference_pb2, worker_pb2
from sagellm_common.rpc.session_client import Mailbox, SessionClient, to_ms
from sagellm_common.rpc.status import from_status

Key = tuple[str, str, int]
"""(operation, request_id, attempt)"""

Replies = AbstractAsyncContextManager[Mailbox[worker_pb2.DecodeResponse]]
PrefillReplies = AbstractAsyncContextManager[Mailbox[worker_pb2.PrefillResult]]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A prompt's first token, before its KV is pinned. There is more to decode."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


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
    engine_ms: float = 0.0
    store_conversion: KvConversion | None = None
    origins: KvOrigins = AT_HAND


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What the decode worker pulled; see the proto."""

    bytes: int
    transfer_ms: float
    blocks: int
    blocks_reused: int
    backend: str
    bytes_ahead: int = 0
    exposed_ms: float = 0.0
    began_ahead_ms: float = 0.0
    conversion: KvConversion | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class PromptKvReport:
    """What the decode worker found of a prompt that it completes by itself; see the proto."""

    cached_tokens: int
    store_tokens: int
    store_fetch_ms: float
    store_conversion: KvConversion | None = None
    origins: KvOrigins = AT_HAND


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """How the decode worker had a routed request prefilled: `outcome` without tokens; see the proto."""

    outcome: PrefillOutcome
    reserve_ms: float
    prefill_ms: float
    pulling_ahead_blocks: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Tokens `index, index + 1, …` of one generation, as one engine step gave them.

    `engine_ms`, of the last one: what the engine took for all of this call's. The last one has finish_reason, CANCELLED
    where it was `handed_over`. `prefilled`, of the first of a routed request: another worker has computed the prompt,
    and this token.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    transfer: TransferReport | None
    engine_ms: float = 0.0
    prompt_kv: PromptKvReport | None = None
    handed_over: HandedOver | None = None
    prefilled: RemotePrefill | None = None


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The worker has ended the generation for another to go on with; `source` None: it must compute the KV anew."""

    source: KvSource | None


class PrefillOptions(TypedDict, total=False):
    """What is asked of a prefill worker beside the request.

    `chunk_tokens` of the prompt are computed at a time, and pulled meanwhile, if `overlap`, in pieces of
    `segment_bytes` (0: as configured; None: the worker decides). `first_token_within_s` and `needed_s` are
    EngineRequest's. `peer` is the worker in whose cache more of the prompt is.
    """

    timeout_s: Required[float]
    overlap: bool | None
    segment_bytes: int
    chunk_tokens: int
    first_token_within_s: float
    needed_s: float
    peer: KvPeer | None


class PrefillSession(SessionClient[Key, worker_pb2.PrefillSessionRequest, worker_pb2.PrefillResult]):
    def __init__(self, channel: grpc.aio.Channel, worker_id: str, address: str, choice: Choice = "auto") -> None:
        super().__init__(channel, address, "sagellm.v1.PrefillService", choice, *_describe(worker_id, address))

    async def prefill(
        self,
        request: GenerationRequest,
        attempt: int,
        ticket: HandoffTicket,
        *,
        on_started: Callable[[KvSource], None] | None = None,
        **asked: Unpack[PrefillOptions],
    ) -> PrefillOutcome:
        """Raises what the worker answers, PeerLost, DeadlineExceeded, Cancelled.

        `on_started` hears where the KV can be pulled while it is computed, if the plan (`overlap`) says that this is
        worth it, or where the plan does not know the worker does.
        """
        async with self.asking(request, attempt, ticket, announce=on_started is not None, **asked) as replies:
            while not isinstance(answer := self.answer_of(await replies.get()), PrefillOutcome):
                if on_started is not None and isinstance(answer, KvSource):
                    on_started(answer)
            return answer

    def asking(
        self,
        request: GenerationRequest,
        attempt: int,
        ticket: HandoffTicket | None,
        *,
        announce: bool = False,
        token_first: bool = False,
        receiver_cached_tokens: int = 0,
        **asked: Unpack[PrefillOptions],
    ) -> PrefillReplies:
        """`async with` sends it and gives the mailbox of its replies, which `answer_of` reads; the last is a
        PrefillOutcome.

        Without a `ticket`, whose reservation is still to be answered, the receiver is said to hold
        `receiver_cached_tokens`. With `announce` a KvSource may come before, to pull from while it is computed; with
        `token_first` the first token.
        """
        timeout_s, within_s = asked["timeout_s"], asked.get("first_token_within_s", math.inf)
        peer = asked.get("peer")
        message = worker_pb2.PrefillRequest(
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=pack_int32(request.prompt_token_ids),
            sampling=codec.encode_sampling(request.sampling),
            ticket=codec.encode_ticket(ticket) if ticket else None,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            priority=request.priority,
            timeout_ms=to_ms(timeout_s),
            trace_context=current_carrier(),
            announce=announce,
            overlap=asked.get("overlap"),
            segment_bytes=asked.get("segment_bytes", 0),
            chunk_tokens=asked.get("chunk_tokens", 0),
            first_token_within_ms=None if math.isinf(within_s) else within_s * 1e3,
            needed_ms=asked.get("needed_s", 0.0) * 1e3,
            peer=codec.encode_peer(peer) if peer else None,
            receiver_cached_tokens=receiver_cached_tokens,
            token_first=token_first,
        )
        key = ("prefill", request.request_id, attempt)
        return self._call(key, worker_pb2.PrefillSessionRequest(prefill=message), timeout_s, _what(key))

    def answer_of(self, result: worker_pb2.PrefillResult) -> KvSource | FirstToken | PrefillOutcome:
        """Raises what the worker answered."""
        match result.WhichOneof("outcome"):
            case "response":
                return _decode_prefill(result.response)
            case "started":
                return codec.decode_kv_source(result.started.source, "started.source")
            case "token":
                token_ids = codec.decode_token_ids(result.token.token_ids, "token.token_ids")
                return FirstToken(tuple(token_ids.tolist()), codec.decode_logprobs(result.token.logprobs))
            case _:
                raise from_status(result.error)

    def cancel(self, request_id: str, attempt: int, *, by_client: bool = False) -> None:
        """Tells the worker to drop the request and any KV pinned for it. A no-op for what it does not know."""
        self._abandon(("prefill", request_id, attempt), f"request {request_id}")
        cancel = worker_pb2.CancelRequest(request_id=request_id, attempt=attempt, by_client=by_client)
        self._send_soon(worker_pb2.PrefillSessionRequest(cancel=cancel))

    def _split(self, message: worker_pb2.PrefillSessionResponse) -> Iterable[tuple[Key, worker_pb2.PrefillResult]]:
        return ((("prefill", result.request_id, result.attempt), result) for result in message.results)


class DecodeSession(SessionClient[Key, worker_pb2.DecodeSessionRequest, Any]):
    def __init__(self, channel: grpc.aio.Channel, worker_id: str, address: str, choice: Choice = "auto") -> None:
        super().__init__(channel, address, "sagellm.v1.DecodeService", choice, *_describe(worker_id, address))
        self._worker_id = worker_id

    async def reserve(
        self, request: GenerationRequest, attempt: int, emitted: Sequence[int] = (), *, timeout_s: float
    ) -> HandoffTicket:
        """For the prompt, and what was `emitted` elsewhere and comes with it. Raises what the worker answers
        (KvExhausted, Draining, …), PeerLost, DeadlineExceeded, Cancelled."""
        message = worker_pb2.ReserveRequest(
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=pack_int32(request.prompt_token_ids),
            max_new_tokens=request.sampling.max_new_tokens,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            timeout_ms=to_ms(timeout_s),
            trace_context=current_carrier(),
            emitted_token_ids=pack_int32(emitted),
        )
        key = ("reserve", request.request_id, attempt)
        async with self._call(key, worker_pb2.DecodeSessionRequest(reserve=message), timeout_s, _what(key)) as replies:
            result = await replies.get()
        if result.HasField("error"):
            raise from_status(result.error)
        return codec.decode_ticket(result.response.ticket)

    def decode(
        self,
        request: GenerationRequest,
        attempt: int,
        emitted: Sequence[int],
        source: KvSource | None,
        *,
        timeout_s: float,
        wire_dtype: str = "",
        chunk_tokens: int = 0,
    ) -> AsyncGenerator[DecodeStep, None]:
        """The steps of one generation after `emitted`; the last has finish_reason. Iterate under `aclosing`.

        Without a source the worker computes prompt and emitted tokens itself, by `chunk_tokens`. That and `wire_dtype`
        are the plan's; 0 and "": as the worker is configured. Raises as `reserve` does, and LeaseExpired, KvCorrupt,
        EngineFailed.
        """
        message = worker_pb2.DecodeRequest(
            request_id=request.request_id,
            attempt=attempt,
            prompt_token_ids=pack_int32(request.prompt_token_ids),
            emitted_token_ids=pack_int32(emitted),
            sampling=codec.encode_sampling(request.sampling),
            source=codec.encode_kv_source(source) if source else None,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            priority=request.priority,
            timeout_ms=to_ms(timeout_s),
            trace_context=current_carrier(),
            wire_dtype=wire_dtype,
            chunk_tokens=chunk_tokens,
        )
        key = ("decode", request.request_id, attempt)
        return self._steps(key, worker_pb2.DecodeSessionRequest(decode=message), timeout_s)

    def routed(
        self,
        request: inference_pb2.GenerateRequest,
        route: inference_pb2.SignedRoute,
        attempt: int,
        emitted: Sequence[int],
        source: KvSource | None = None,
        *,
        timeout_s: float,
    ) -> Replies:
        """A whole generation after `emitted`, its prefill included, or its KV pulled from `source`. `async with` gives
        the mailbox of its replies, which `step_of` reads; the last has finish_reason.

        Errors say in their metadata at which `stage` of it they came: reserve, prefill; else it was decoding.
        """
        message = worker_pb2.RoutedRequest(
            route=route,
            request=request,
            emitted_token_ids=pack_int32(emitted),
            source=codec.encode_kv_source(source) if source is not None else None,
        )
        key = ("decode", request.request_id, attempt)
        return self._call(key, worker_pb2.DecodeSessionRequest(routed=message), timeout_s, _what(key))

    def step_of(self, reply: worker_pb2.DecodeResponse) -> DecodeStep:
        """Raises what the worker answered; tokens that come with an error are a step of their own before it."""
        if reply.finish_reason != common_pb2.FINISH_REASON_ERROR:
            return _decode_step(reply)
        if reply.HasField("error"):
            raise from_status(reply.error)
        raise EngineFailed(f"worker {self._worker_id} failed without saying why")

    async def _steps(
        self, key: Key, message: worker_pb2.DecodeSessionRequest, timeout_s: float
    ) -> AsyncGenerator[DecodeStep, None]:
        async with self._call(key, message, timeout_s, _what(key)) as replies:
            finished = False
            while not finished:
                reply = await replies.get()
                step = _decode_step(reply)
                finished = step.finish_reason is not None
                if step.finish_reason is not FinishReason.ERROR:
                    yield step
                    continue
                if step.token_ids:
                    yield replace(step, finish_reason=None)
                raise (
                    from_status(reply.error)
                    if reply.HasField("error")
                    else EngineFailed(f"worker {self._worker_id} failed without saying why")
                )

    def abandon(self, request_id: str, attempt: int, error: SageError) -> None:
        """Ends the call that waits for this generation with `error`, and tells the worker."""
        self._abandon_with(("decode", request_id, attempt), error)
        cancel = worker_pb2.CancelRequest(request_id=request_id, attempt=attempt, by_client=True)
        self._send_if_open(worker_pb2.DecodeSessionRequest(cancel=cancel))

    def pull_ahead(
        self,
        request_id: str,
        attempt: int,
        source: KvSource,
        *,
        timeout_s: float,
        priority: int = 0,
        wire_dtype: str = "",
    ) -> None:
        """Lets the worker fill the blocks it has reserved while `source` computes them. Never waits.

        Nobody answers: `decode` finds what is there, and `release` and `cancel` end it.
        """
        message = worker_pb2.PullAheadRequest(
            request_id=request_id,
            attempt=attempt,
            source=codec.encode_kv_source(source),
            timeout_ms=to_ms(timeout_s),
            trace_context=current_carrier(),
            priority=priority,
            wire_dtype=wire_dtype,
        )
        self._send_soon(worker_pb2.DecodeSessionRequest(pull_ahead=message))

    def cancel(self, request_id: str, attempt: int, *, by_client: bool = False) -> None:
        """Tells the worker to stop generating. A no-op for what it does not know."""
        self._abandon(("decode", request_id, attempt), f"request {request_id}")
        cancel = worker_pb2.CancelRequest(request_id=request_id, attempt=attempt, by_client=by_client)
        self._send_soon(worker_pb2.DecodeSessionRequest(cancel=cancel))

    def hand_over(self, request_id: str, attempt: int) -> None:
        """Has the worker end the generation after its step, its KV pinned: `decode`'s last step says so. A no-op for
        what it does not decode."""
        hand_over = worker_pb2.HandOverRequest(request_id=request_id, attempt=attempt)
        self._send_soon(worker_pb2.DecodeSessionRequest(hand_over=hand_over))  # its client may have its own session

    def release(self, request_id: str, attempt: int, *, by_client: bool = False) -> None:
        """Gives reserved blocks back. A no-op for what the worker does not know or decodes already."""
        self._abandon(("reserve", request_id, attempt), f"request {request_id}")
        release = worker_pb2.ReleaseReservationRequest(request_id=request_id, attempt=attempt, by_client=by_client)
        self._send_soon(worker_pb2.DecodeSessionRequest(release=release))

    def renew(self, request_id: str, attempt: int) -> None:
        """Keeps a reservation alive. A no-op for what the worker does not hold (any more)."""
        renew = worker_pb2.RenewReservationRequest(request_id=request_id, attempt=attempt)
        self._send_soon(worker_pb2.DecodeSessionRequest(renew=renew))

    def _split(self, message: worker_pb2.DecodeSessionResponse) -> Iterable[tuple[Key, Any]]:
        for output in message.outputs:
            yield ("decode", output.request_id, output.attempt), output
        for result in message.reservations:
            yield ("reserve", result.request_id, result.attempt), result


def _describe(worker_id: str, address: str) -> tuple[str, dict[str, str]]:
    """As PeerLost tells it."""
    return f"worker {worker_id} at {address}", {"worker_id": worker_id, "address": address}


def _what(key: Key) -> str:
    operation, request_id, _ = key
    return f"{operation} of request {request_id}"


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
        engine_ms=response.engine_ms,
        store_conversion=_conversion(response),
        origins=codec.decode_origins(response.origins),
    )


def _conversion(message: worker_pb2.PrefillResponse | worker_pb2.PromptKv) -> KvConversion | None:
    return codec.decode_conversion(message.store_conversion) if message.HasField("store_conversion") else None


def _decode_step(response: worker_pb2.DecodeResponse) -> DecodeStep:
    transfer = response.transfer if response.HasField("transfer") else None
    return DecodeStep(
        index=response.index,
        token_ids=tuple(codec.decode_token_ids(response.token_ids).tolist()),
        logprobs=codec.decode_logprobs(response.logprobs),
        finish_reason=codec.decode_finish_reason(response.finish_reason),
        transfer=TransferReport(
            bytes=transfer.bytes,
            transfer_ms=transfer.transfer_ms,
            blocks=transfer.blocks,
            blocks_reused=transfer.blocks_reused,
            backend=transfer.backend,
            bytes_ahead=transfer.bytes_ahead,
            exposed_ms=transfer.exposed_ms,
            began_ahead_ms=transfer.began_ahead_ms,
            conversion=codec.decode_conversion(transfer.conversion) if transfer.HasField("conversion") else None,
            why=transfer.why,
        )
        if transfer
        else None,
        engine_ms=response.engine_ms,
        prompt_kv=_prompt_kv(response.prompt_kv) if response.HasField("prompt_kv") else None,
        handed_over=_handed_over(response.handed_over) if response.HasField("handed_over") else None,
        prefilled=_remote_prefill(response.prefilled) if response.HasField("prefilled") else None,
    )


def _handed_over(message: worker_pb2.HandedOver) -> HandedOver:
    return HandedOver(codec.decode_kv_source(message.source) if message.HasField("source") else None)


def _remote_prefill(message: worker_pb2.Prefilled) -> RemotePrefill:
    outcome = _decode_prefill(message.response)
    return RemotePrefill(outcome, message.reserve_ms, message.prefill_ms, message.pulling_ahead_blocks)


def _prompt_kv(message: worker_pb2.PromptKv) -> PromptKvReport:
    return PromptKvReport(
        message.cached_tokens,
        message.store_tokens,
        message.store_fetch_ms,
        store_conversion=_conversion(message),
        origins=codec.decode_origins(message.origins),
    )
