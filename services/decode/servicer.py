"""DecodeService: decode → call the domain → encode."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc

from sagellm_common.comm_backend.wire_dtype import WIRE_DTYPES
from sagellm_common.core.errors import Cancelled, InvalidRequest, LeaseExpired, SageError
from sagellm_common.core.types import FinishReason, KvPeer, pack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, plan_pb2, worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.handoffs import canceller
from sagellm_common.rpc.interceptors import session_call
from sagellm_common.rpc.routes import RouteSigner, decode_address, parse_route
from sagellm_common.rpc.session_writer import SessionWriter
from sagellm_common.rpc.sessions import RemotePrefill
from sagellm_common.rpc.status import to_status
from services.decode.jobs import Decode, DecodeChunk, DecodeJob, Emit, PullAheadJob, ReserveJob, RoutedJob
from services.decode.routed import RoutedRequests

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Writer = SessionWriter[worker_pb2.DecodeSessionResponse]

SERVICE = "sagellm.v1.DecodeService"

_KINDS = plan_pb2.PLAN_NODE_KIND_PREFILL, plan_pb2.PLAN_NODE_KIND_TRANSFER, plan_pb2.PLAN_NODE_KIND_DECODE


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    """`default_timeout_s` is for callers that send no timeout_ms. Routed requests must come with routes of `signer`."""

    def __init__(self, decode: Decode, default_timeout_s: float, routed: RoutedRequests, signer: RouteSigner) -> None:
        self._decode = decode
        self._default_timeout_s = default_timeout_s
        self._routed = routed
        self._signer = signer

    async def Reserve(self, request: worker_pb2.ReserveRequest, context: Context) -> worker_pb2.ReserveResponse:
        return self._reserve(request)

    async def ReleaseReservation(
        self, request: worker_pb2.ReleaseReservationRequest, context: Context
    ) -> worker_pb2.ReleaseReservationResponse:
        self._decode.release(request.request_id, request.attempt, canceller(request))
        return worker_pb2.ReleaseReservationResponse()

    async def RenewReservation(
        self, request: worker_pb2.RenewReservationRequest, context: Context
    ) -> worker_pb2.RenewReservationResponse:
        left_s = self._decode.renew(request.request_id, request.attempt)
        return worker_pb2.RenewReservationResponse(expires_in_ms=int(left_s * 1000))

    async def Cancel(self, request: worker_pb2.CancelRequest, context: Context) -> worker_pb2.CancelResponse:
        self._decode.cancel(request.request_id, request.attempt, canceller(request))
        return worker_pb2.CancelResponse()

    async def HandOver(self, request: worker_pb2.HandOverRequest, context: Context) -> worker_pb2.HandOverResponse:
        self._decode.hand_over(request.request_id, request.attempt)
        return worker_pb2.HandOverResponse()

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Context) -> None:
        async def write(message: worker_pb2.DecodeSessionResponse) -> None:
            for response in message.outputs:
                await context.write(response)

        writer = Writer(worker_pb2.DecodeSessionResponse, write)
        job = self._job(request)
        async with writer.serving():
            await self._decode.decode(job, _emitter(job, writer))

    async def Session(self, requests: AsyncIterator[worker_pb2.DecodeSessionRequest], context: Context) -> None:
        """Each generation runs in a task of the session: the stream's end, however it comes, cancels the unfinished.

        Reservations outlive it: their lease does.
        """
        writer = Writer.of(worker_pb2.DecodeSessionResponse, context)
        async with writer.serving() as running:
            async for message in requests:
                match message.WhichOneof("op"):
                    case "reserve":
                        writer.message.reservations.append(self._reserve_result(message.reserve))
                        writer.flush()
                    case "pull_ahead":
                        self._pull_ahead(message.pull_ahead)
                    case "decode":
                        running.create_task(self._generate(message.decode, writer))
                    case "routed":
                        running.create_task(self._generate_routed(message.routed, writer))
                    case "cancel":
                        cancel = message.cancel
                        self._decode.cancel(cancel.request_id, cancel.attempt, canceller(cancel))
                        self._routed.cancel(cancel.request_id, cancel.attempt, canceller(cancel))
                    case "hand_over":
                        self._decode.hand_over(message.hand_over.request_id, message.hand_over.attempt)
                    case "release":
                        release = message.release
                        self._decode.release(release.request_id, release.attempt, canceller(release))
                    case "renew":
                        with contextlib.suppress(LeaseExpired):  # the request finds out when it comes for the blocks
                            self._decode.renew(message.renew.request_id, message.renew.attempt)

    async def _generate(self, request: worker_pb2.DecodeRequest, writer: Writer) -> None:
        end = worker_pb2.DecodeResponse(request_id=request.request_id, attempt=request.attempt)
        try:
            job = self._job(request)
            await self._decode.decode(job, _emitter(job, writer))
            return
        except Cancelled:
            end.finish_reason = codec.encode_finish_reason(FinishReason.CANCELLED)
        except SageError as err:
            end.finish_reason = codec.encode_finish_reason(FinishReason.ERROR)
            end.error.CopyFrom(to_status(err))
        except Exception as err:
            log.exception("decode of request %s failed", request.request_id)
            end.finish_reason = codec.encode_finish_reason(FinishReason.ERROR)
            end.error.CopyFrom(to_status(err))
        writer.message.outputs.append(end)

    async def _generate_routed(self, message: worker_pb2.RoutedRequest, writer: Writer) -> None:
        """Whoever ended it, its client is told by an error: a cancellation says in its metadata by whom."""
        request, route = message.request, inference_pb2.Route()

        def refuse(err: SageError) -> None:
            end = writer.message.outputs.add(request_id=request.request_id, attempt=route.attempt, error=to_status(err))
            end.finish_reason = codec.encode_finish_reason(FinishReason.ERROR)

        def emit(chunk: DecodeChunk) -> None:
            encode_chunk(writer.message.outputs.add(), request.request_id, route.attempt, chunk)
            if chunk.prefilled is not None:
                writer.flush()

        with session_call(SERVICE, "Routed", request.request_id, request.trace_context, refuse):
            route = parse_route(message.route)
            self._signer.check(message.route, route, request)
            await self._routed.run(self._routed_job(message, route), emit)

    def _routed_job(self, message: worker_pb2.RoutedRequest, route: inference_pb2.Route) -> RoutedJob:
        nodes = {node.kind: node for node in route.plan.nodes}
        prefill, transfer, decode = (nodes.get(kind) for kind in _KINDS)
        within_s = route.first_token_within_ms / 1e3 if route.HasField("first_token_within_ms") else math.inf
        return RoutedJob(
            request=codec.decode_generation_request(message.request),
            attempt=route.attempt,
            emitted=codec.decode_token_ids(message.emitted_token_ids, "emitted_token_ids"),
            timeout_s=self._timeout_s(message.request.timeout_ms),
            prefill=decode_address(route.prefill, "route.prefill") if route.HasField("prefill") else None,
            source=codec.decode_kv_source(message.source) if message.HasField("source") else None,
            priority=decode.priority if decode else 0,
            prefill_priority=prefill.priority if prefill else 0,
            chunk_tokens=prefill.chunk_tokens if prefill else 0,
            overlap=transfer.overlap if transfer and transfer.HasField("overlap") else None,
            segment_bytes=transfer.segment_bytes if transfer else 0,
            wire_dtype=_wire_dtype(transfer.wire_dtype if transfer else ""),
            first_token_within_s=within_s,
            needed_s=route.needed_ms / 1e3,
            peer=_peer(route),
        )

    def _reserve_result(self, request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResult:
        result = worker_pb2.ReserveResult(request_id=request.request_id, attempt=request.attempt)
        try:
            result.response.CopyFrom(self._reserve(request))
        except SageError as err:
            result.error.CopyFrom(to_status(err))
        except Exception as err:
            log.exception("reservation for request %s failed", request.request_id)
            result.error.CopyFrom(to_status(err))
        return result

    def _reserve(self, request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResponse:
        job = ReserveJob(
            request_id=_request_id(request.request_id),
            attempt=request.attempt,
            prompt=codec.decode_token_ids(request.prompt_token_ids, "prompt_token_ids"),
            emitted=codec.decode_token_ids(request.emitted_token_ids, "emitted_token_ids"),
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            trace_context=dict(request.trace_context),
        )
        ticket = self._decode.reserve(job)
        return worker_pb2.ReserveResponse(
            request_id=request.request_id, attempt=request.attempt, ticket=codec.encode_ticket(ticket)
        )

    def _pull_ahead(self, request: worker_pb2.PullAheadRequest) -> None:
        """Nobody waits for an answer: what is wrong with it is logged, and the Decode call pulls for itself."""
        try:
            job = PullAheadJob(
                request_id=_request_id(request.request_id),
                attempt=request.attempt,
                source=codec.decode_kv_source(request.source),
                timeout_s=self._timeout_s(request.timeout_ms),
                priority=request.priority,
                wire_dtype=_wire_dtype(request.wire_dtype),
                trace_context=dict(request.trace_context),
            )
        except SageError as err:
            log.warning("a pull ahead of request %r is refused: %s", request.request_id, err.message)
        else:
            self._decode.pull_ahead(job)

    def _timeout_s(self, timeout_ms: int) -> float:
        if timeout_ms < 0:
            raise InvalidRequest(f"timeout_ms is {timeout_ms}, but must be at least 0")
        return timeout_ms / 1000 or self._default_timeout_s

    def _job(self, request: worker_pb2.DecodeRequest) -> DecodeJob:
        return DecodeJob(
            request_id=_request_id(request.request_id),
            attempt=request.attempt,
            prompt=codec.decode_token_ids(request.prompt_token_ids, "prompt_token_ids"),
            emitted=codec.decode_token_ids(request.emitted_token_ids, "emitted_token_ids"),
            sampling=codec.decode_sampling(request.sampling),
            timeout_s=self._timeout_s(request.timeout_ms),
            source=codec.decode_kv_source(request.source) if request.HasField("source") else None,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            priority=request.priority,
            wire_dtype=_wire_dtype(request.wire_dtype),
            chunk_tokens=_chunk_tokens(request.chunk_tokens),
            trace_context=dict(request.trace_context),
        )


def _emitter(job: DecodeJob, writer: Writer) -> Emit:
    return lambda chunk: encode_chunk(writer.message.outputs.add(), job.request_id, job.attempt, chunk)


def _chunk_tokens(number: int) -> int:
    if number < 0:
        raise InvalidRequest(f"chunk_tokens is {number}, but must be at least 0")
    return number


def _wire_dtype(name: str) -> str:
    if name and name not in WIRE_DTYPES:
        raise InvalidRequest(f"wire_dtype is {name!r}, but must be empty or one of {', '.join(WIRE_DTYPES)}")
    return name


def _peer(route: inference_pb2.Route) -> KvPeer | None:
    """Whose cache the plan's fetch is from."""
    fetch = next((node for node in route.plan.nodes if node.source_id), None)
    if fetch is None or not route.HasField("peer"):
        return None
    peer = decode_address(route.peer, "route.peer")
    return KvPeer(peer.worker_id, peer.incarnation, peer.address, fetch.end_token)


def _request_id(request_id: str) -> str:
    if not request_id:
        raise InvalidRequest("request_id is empty, but must be set")
    return request_id


def encode_chunk(response: worker_pb2.DecodeResponse, request_id: str, attempt: int, chunk: DecodeChunk) -> None:
    """Into `response`, in place: this is on the path of every token, and most fields are at their defaults."""
    response.request_id = request_id
    response.attempt = attempt
    response.index = chunk.index
    response.token_ids = pack_int32(chunk.token_ids)
    if chunk.logprobs:
        response.logprobs.extend(codec.encode_logprobs(chunk.logprobs))
    if chunk.finish_reason is not None:
        response.finish_reason = codec.encode_finish_reason(chunk.finish_reason)
        response.engine_ms = chunk.engine_ms
    if chunk.handed_over is not None:
        response.handed_over.SetInParent()
        if chunk.handed_over.source is not None:
            response.handed_over.source.CopyFrom(codec.encode_kv_source(chunk.handed_over.source))
    if chunk.prompt_kv is not None:
        response.prompt_kv.cached_tokens = chunk.prompt_kv.cached_tokens
        response.prompt_kv.store_tokens = chunk.prompt_kv.store_tokens
        response.prompt_kv.store_fetch_ms = chunk.prompt_kv.store_fetch_ms
        response.prompt_kv.origins.CopyFrom(codec.encode_origins(chunk.prompt_kv.origins))
        if chunk.prompt_kv.store_conversion is not None:
            response.prompt_kv.store_conversion.CopyFrom(codec.encode_conversion(chunk.prompt_kv.store_conversion))
    if chunk.transfer is not None:
        response.transfer.bytes = chunk.transfer.bytes
        response.transfer.transfer_ms = chunk.transfer.transfer_ms
        response.transfer.blocks = chunk.transfer.blocks
        response.transfer.blocks_reused = chunk.transfer.blocks_reused
        response.transfer.backend = chunk.transfer.backend
        response.transfer.bytes_ahead = chunk.transfer.bytes_ahead
        response.transfer.exposed_ms = chunk.transfer.exposed_ms
        response.transfer.began_ahead_ms = chunk.transfer.began_ahead_ms
        response.transfer.why = chunk.transfer.why
        if chunk.transfer.conversion is not None:
            response.transfer.conversion.CopyFrom(codec.encode_conversion(chunk.transfer.conversion))
    if chunk.prefilled is not None:
        _encode_prefilled(response.prefilled, chunk.prefilled)


def _encode_prefilled(message: worker_pb2.Prefilled, prefilled: RemotePrefill) -> None:
    outcome = prefilled.outcome
    message.reserve_ms = prefilled.reserve_ms
    message.prefill_ms = prefilled.prefill_ms
    message.pulling_ahead_blocks = prefilled.pulling_ahead_blocks
    for name in ("cached_tokens", "store_tokens", "queue_ms", "compute_ms", "store_fetch_ms", "engine_ms"):
        setattr(message.response, name, getattr(outcome, name))
    message.response.origins.CopyFrom(codec.encode_origins(outcome.origins))
    if outcome.store_conversion is not None:
        message.response.store_conversion.CopyFrom(codec.encode_conversion(outcome.store_conversion))
