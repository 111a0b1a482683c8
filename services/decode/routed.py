"""A whole generation for the client that brings its route: reserve here → prefill there → decode here.

The same steps as the router's pipeline, without the router between them; whoever fails ends the attempt, and the client
asks a router for another route.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from sagellm_common.comm_backend.handoff import Party
from sagellm_common.core.errors import EngineFailed, SageError
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import KvSource, TokenIds, WorkerAddress
from sagellm_common.rpc.renewal import renewed
from sagellm_common.rpc.sessions import PrefillOutcome, PrefillSession, RemotePrefill
from sagellm_common.rpc.worker_sessions import WorkerSessions
from services.decode.jobs import Decode, DecodeChunk, DecodeJob, Emit, PullAheadJob, ReserveJob, RoutedJob
from services.decode.running import RunningRequests


class RoutedRequests:
    def __init__(self, decode: Decode, prefills: WorkerSessions[PrefillSession]) -> None:
        self._decode = decode
        self._prefills = prefills
        self._prefilling = RunningRequests()
        """While they decode, they are among `decode`'s."""

    async def run(self, job: RoutedJob, emit: Emit) -> None:
        """As `Decode.decode`, with the first token, too. Errors from before it say at which `stage` they came."""
        emitted, source = job.emitted, job.source
        if job.prefill is not None:
            with self._prefilling.enter(job.request.request_id, job.attempt):
                outcome, prefilled = await self._prefill(job, job.prefill)
            emit(DecodeChunk(0, outcome.token_ids, outcome.logprobs, outcome.finish_reason, prefilled=prefilled))
            if outcome.finish_reason is not None:
                self._decode.release(job.request.request_id, job.attempt)
                return
            emitted, source = np.array(outcome.token_ids, dtype=np.int32), outcome.source
        elif source is not None:
            with _at("reserve"):
                self._decode.reserve(_reserve_job(job))
        await self._decode.decode(_decode_job(job, emitted, source), emit)

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Ends this attempt and older ones with Cancelled, as far as they have no first token yet."""
        self._prefilling.cancel(request_id, attempt, by)

    async def _prefill(self, job: RoutedJob, worker: WorkerAddress) -> tuple[PrefillOutcome, RemotePrefill]:
        """The first token, with the prompt's KV pinned there and blocks for it reserved here; or the end of it all."""
        request, began_s = job.request, time.monotonic()
        with _at("reserve"):
            ticket = self._decode.reserve(_reserve_job(job))
        reserved_s = time.monotonic()
        session, pulling = self._prefills.get(worker), list[KvSource]()

        def pull_ahead(source: KvSource) -> None:
            pulling.append(source)
            self._decode.pull_ahead(
                PullAheadJob(
                    request.request_id,
                    job.attempt,
                    source,
                    job.timeout_s,
                    job.priority,
                    job.wire_dtype,
                    trace_context=current_carrier(),
                )
            )

        try:
            with _at("prefill"), renewed(ticket, self._decode.renew):
                outcome = await session.prefill(
                    replace(request, priority=job.prefill_priority),
                    job.attempt,
                    ticket,
                    timeout_s=job.timeout_s,
                    on_started=None if job.overlap is False else pull_ahead,
                    overlap=job.overlap,
                    segment_bytes=job.segment_bytes,
                    chunk_tokens=job.chunk_tokens,
                    first_token_within_s=job.first_token_within_s,
                    needed_s=job.needed_s,
                    peer=job.peer,
                )
                if outcome.finish_reason is None and (outcome.source is None or len(outcome.token_ids) != 1):
                    raise EngineFailed(f"prefill worker {worker.worker_id} answered without a first token and its KV")
        except BaseException:
            session.cancel(request.request_id, job.attempt)
            self._decode.release(request.request_id, job.attempt)
            raise
        return outcome, RemotePrefill(
            outcome,
            reserve_ms=(reserved_s - began_s) * 1e3,
            prefill_ms=(time.monotonic() - reserved_s) * 1e3,
            pulling_ahead_blocks=len(pulling[0].block_table) if pulling else 0,
        )


@contextmanager
def _at(stage: str) -> Iterator[None]:
    """Errors of the block say that they came there."""
    try:
        yield
    except SageError as err:
        err.metadata.setdefault("stage", stage)
        raise


def _reserve_job(job: RoutedJob) -> ReserveJob:
    request = job.request
    return ReserveJob(
        request.request_id,
        job.attempt,
        request.prompt_token_ids,
        job.emitted,
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        trace_context=current_carrier(),
    )


def _decode_job(job: RoutedJob, emitted: TokenIds, source: KvSource | None) -> DecodeJob:
    request = job.request
    return DecodeJob(
        request_id=request.request_id,
        attempt=job.attempt,
        prompt=request.prompt_token_ids,
        emitted=emitted,
        sampling=request.sampling,
        timeout_s=job.timeout_s,
        source=source,
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        priority=job.priority,
        wire_dtype=job.wire_dtype,
        chunk_tokens=0 if job.prefill is not None else job.chunk_tokens,
        trace_context=current_carrier(),
    )
