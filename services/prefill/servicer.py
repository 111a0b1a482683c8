"""PrefillService: decode → call the domain → encode."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.rpc import status_pb2

from sagellm_common.core.errors import InvalidRequest, SageError
from sagellm_common.core.types import KvSource, TokenLogprob, pack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.handoffs import canceller
from sagellm_common.rpc.session_writer import SessionWriter
from sagellm_common.rpc.status import to_status
from services.prefill.jobs import Announce, Prefill, PrefillDone, PrefillJob, TellToken

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Writer = SessionWriter[worker_pb2.PrefillSessionResponse]


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """`default_timeout_s` is for callers that send no timeout_ms."""

    def __init__(self, prefill: Prefill, default_timeout_s: float) -> None:
        self._prefill = prefill
        self._default_timeout_s = default_timeout_s

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Context) -> worker_pb2.PrefillResponse:
        return encode_done(request, await self._prefill.prefill(self._job(request)))

    async def Cancel(self, request: worker_pb2.CancelRequest, context: Context) -> worker_pb2.CancelResponse:
        self._prefill.cancel(request.request_id, request.attempt, canceller(request))
        return worker_pb2.CancelResponse()

    async def Session(self, requests: AsyncIterator[worker_pb2.PrefillSessionRequest], context: Context) -> None:
        """Each request runs in a task of the session: the stream's end, however it comes, cancels the unfinished."""
        writer = Writer.of(worker_pb2.PrefillSessionResponse, context)
        async with writer.serving() as running:
            async for message in requests:
                if message.HasField("prefill"):
                    running.create_task(self._answer(message.prefill, writer))
                elif message.HasField("cancel"):
                    cancel = message.cancel
                    self._prefill.cancel(cancel.request_id, cancel.attempt, canceller(cancel))

    async def _answer(self, request: worker_pb2.PrefillRequest, writer: Writer) -> None:
        response: worker_pb2.PrefillResponse | None = None
        error: status_pb2.Status | None = None

        def announce(source: KvSource) -> None:
            started = worker_pb2.PrefillStarted(source=codec.encode_kv_source(source))
            writer.message.results.add(request_id=request.request_id, attempt=request.attempt, started=started)

        def tell_token(token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> None:
            token = worker_pb2.PrefillToken(token_ids=pack_int32(token_ids), logprobs=codec.encode_logprobs(logprobs))
            writer.message.results.add(request_id=request.request_id, attempt=request.attempt, token=token)
            writer.flush()  # before its KV is pinned

        try:
            job = self._job(
                request, announce if request.announce else None, tell_token if request.token_first else None
            )
            response = encode_done(request, await self._prefill.prefill(job))
        except SageError as err:
            error = to_status(err)
        except Exception as err:
            log.exception("prefill of request %s failed", request.request_id)
            error = to_status(err)
        writer.message.results.add(
            request_id=request.request_id, attempt=request.attempt, response=response, error=error
        )
        writer.flush()

    def _job(
        self,
        request: worker_pb2.PrefillRequest,
        announce: Announce | None = None,
        tell_token: TellToken | None = None,
    ) -> PrefillJob:
        if not request.request_id:
            raise InvalidRequest("request_id is empty, but must be set")
        if request.timeout_ms < 0:
            raise InvalidRequest(f"timeout_ms is {request.timeout_ms}, but must be at least 0")
        return PrefillJob(
            request_id=request.request_id,
            attempt=request.attempt,
            prompt=codec.decode_token_ids(request.prompt_token_ids, "prompt_token_ids"),
            sampling=codec.decode_sampling(request.sampling),
            timeout_s=request.timeout_ms / 1000 or self._default_timeout_s,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            priority=request.priority,
            trace_context=dict(request.trace_context),
            receiver_cached_tokens=(
                request.ticket.num_cached_tokens if request.HasField("ticket") else request.receiver_cached_tokens
            ),
            announce=announce,
            tell_token=tell_token,
            overlap=request.overlap if request.HasField("overlap") else None,
            segment_bytes=_planned(request, "segment_bytes"),
            chunk_tokens=_planned(request, "chunk_tokens"),
            first_token_within_s=_target_s(request),
            needed_s=_needed_s(request),
            peer=codec.decode_peer(request.peer) if request.HasField("peer") else None,
        )


def _planned(request: worker_pb2.PrefillRequest, name: str) -> int:
    wanted: int = getattr(request, name)
    if wanted < 0:
        raise InvalidRequest(f"{name} is {wanted}, but must be at least 0 (0: as configured)")
    return wanted


def _target_s(request: worker_pb2.PrefillRequest) -> float:
    if not request.HasField("first_token_within_ms"):
        return math.inf
    if math.isnan(request.first_token_within_ms):
        raise InvalidRequest("first_token_within_ms is not a number; leave it unset for no target")
    return request.first_token_within_ms / 1e3


def _needed_s(request: worker_pb2.PrefillRequest) -> float:
    if not 0 <= request.needed_ms < math.inf:
        raise InvalidRequest(f"needed_ms is {request.needed_ms}, but must be at least 0 and finite (0: not known)")
    return request.needed_ms / 1e3


def encode_done(request: worker_pb2.PrefillRequest, done: PrefillDone) -> worker_pb2.PrefillResponse:
    return worker_pb2.PrefillResponse(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=pack_int32(done.token_ids),
        logprobs=codec.encode_logprobs(done.logprobs),
        finish_reason=codec.encode_finish_reason(done.finish_reason),
        source=codec.encode_kv_source(done.source) if done.source else None,
        cached_tokens=done.cached_tokens,
        store_tokens=done.store_tokens,
        queue_ms=done.queue_ms,
        compute_ms=done.compute_ms,
        store_fetch_ms=done.store_fetch_ms,
        engine_ms=done.engine_ms,
        store_conversion=codec.encode_conversion(done.store_conversion) if done.store_conversion else None,
        origins=codec.encode_origins(done.origins),
    )
