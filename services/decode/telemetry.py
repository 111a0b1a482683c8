"""What decode tells about itself, as a wrapper: the loop knows nothing of it."""

from __future__ import annotations

import sys
import time

from prometheus_client import Counter, Histogram

from sagellm_common.comm_backend.handoff import Party
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.comm_backend.overlap import efficiency
from sagellm_common.comm_backend.telemetry import REQUEST_SHARE, observe_handoff
from sagellm_common.core.errors import SageError
from sagellm_common.core.telemetry import span
from sagellm_common.core.types import HandoffTicket, KvConversion
from services.decode.jobs import Decode, DecodeChunk, DecodeJob, Emit, PullAheadJob, ReserveJob, Transfer

_TPOT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)

RESERVATIONS = Counter("sagellm_decode_reservations", "Reservations: done or the error's reason.", ["outcome"])
REQUESTS = Counter("sagellm_decode_requests", "Generations by finish reason or the error's reason.", ["outcome"])
TOKENS = Counter("sagellm_decode_tokens", "Tokens generated.")
TPOT_SECONDS = Histogram("sagellm_decode_tpot_seconds", "Time per token after the first here.", buckets=_TPOT_SECONDS)
EXPOSED_SECONDS = Histogram(
    "sagellm_decode_exposed_transfer_seconds",
    "From the Decode call until the prompt's KV was here: what overlap did not hide.",
    buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
RELATIVE_RMS_ERROR = Histogram(
    "sagellm_decode_handoff_relative_rms_error",
    "Of KV whose dtype was changed on its way: what arrived against what was there.",
    ["wire_dtype"],
    buckets=(1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
)
MAX_ABS_ERROR = Histogram(
    "sagellm_decode_handoff_max_abs_error",
    "The same: the largest difference of a handoff.",
    ["wire_dtype"],
    buckets=(1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0),
)
NON_FINITE = Counter("sagellm_decode_handoff_non_finite", "Converted KV values that are inf or NaN.")
OVERLAP_EFFICIENCY = Histogram(
    "sagellm_decode_overlap_efficiency",
    "Overlapped share of a transfer's time: 1 when nobody waited for it.",
    buckets=(0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0),
)
BYTES = Counter("sagellm_decode_handoff_bytes", "KV bytes handed over: ahead of the Decode call, or in it.", ["when"])
BLOCKS = Counter("sagellm_decode_handoff_blocks", "Prompt blocks handed over: pulled, or reused.", ["origin"])

_RESERVED = RESERVATIONS.labels("done")
"""Looked up once: it stands between a request and its first token."""


class ObservedDecode:
    """A `Decode` with spans, metrics and a record of each handoff."""

    def __init__(self, inner: Decode, handoffs: HandoffLog) -> None:
        self._inner = inner
        self._handoffs = handoffs

    def reserve(self, job: ReserveJob) -> HandoffTicket:
        with span(
            "reserve",
            job.trace_context,
            request_id=job.request_id,
            attempt=job.attempt,
            prompt_tokens=len(job.prompt),
        ) as current:
            try:
                ticket = self._inner.reserve(job)
            except SageError as err:
                RESERVATIONS.labels(err.reason.lower()).inc()
                observe_handoff(self._handoffs.refused(job.request_id, job.attempt, err))
                raise
            current.set_attribute("cached_tokens", ticket.num_cached_tokens)
        _RESERVED.inc()
        return ticket

    def release(self, request_id: str, attempt: int, by: Party = "router") -> None:
        self._inner.release(request_id, attempt, by)

    def renew(self, request_id: str, attempt: int) -> float:
        return self._inner.renew(request_id, attempt)

    def pull_ahead(self, job: PullAheadJob) -> None:
        self._inner.pull_ahead(job)

    async def decode(self, job: DecodeJob, emit: Emit) -> None:
        meter = _Meter(emit)
        if job.source is not None:
            self._handoffs.called(job.request_id, job.attempt, job.source)
        with span(
            "decode",
            job.trace_context,
            request_id=job.request_id,
            attempt=job.attempt,
            emitted_tokens=len(job.emitted),
        ) as current:
            outcome = "cancelled"
            try:
                await self._inner.decode(job, meter)
                outcome = meter.finish_reason
            except SageError as err:
                outcome = err.reason.lower()
                raise
            except Exception:
                outcome = "internal"
                raise
            finally:
                if (error := sys.exception()) is not None and job.source is not None:
                    observe_handoff(self._handoffs.failed(job.request_id, job.attempt, error))
                current.set_attribute("tokens", meter.num_tokens)
                REQUESTS.labels(outcome).inc()
                meter.report()

    def hand_over(self, request_id: str, attempt: int) -> None:
        self._inner.hand_over(request_id, attempt)

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        self._inner.cancel(request_id, attempt, by)


def _observe(conversion: KvConversion) -> None:
    RELATIVE_RMS_ERROR.labels(conversion.wire_dtype).observe(conversion.relative_rms_error)
    MAX_ABS_ERROR.labels(conversion.wire_dtype).observe(conversion.max_abs_error)
    NON_FINITE.inc(conversion.non_finite)


class _Meter:
    """Counts what passes. On the path of every token, so it only adds and looks at the clock."""

    __slots__ = ("_began_s", "_emit", "_exposed_s", "_first_s", "_last_s", "finish_reason", "num_tokens")

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._began_s = time.perf_counter()
        self._exposed_s: float | None = None
        self._first_s = self._last_s = 0.0
        self.num_tokens = 0
        self.finish_reason = "none"

    def __call__(self, chunk: DecodeChunk) -> None:
        self._emit(chunk)
        self._last_s = time.perf_counter()
        if not self.num_tokens:
            self._first_s = self._last_s
        self.num_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.finish_reason = "handed_over" if chunk.handed_over else chunk.finish_reason.value
        if chunk.transfer is not None:
            self._transferred(chunk.transfer)

    def _transferred(self, transfer: Transfer) -> None:
        BLOCKS.labels("pulled").inc(transfer.blocks)
        BLOCKS.labels("reused").inc(transfer.blocks_reused)
        BYTES.labels("ahead").inc(transfer.bytes_ahead)
        BYTES.labels("in_call").inc(transfer.bytes - transfer.bytes_ahead)
        EXPOSED_SECONDS.observe(transfer.exposed_ms / 1e3)
        if transfer.bytes:
            OVERLAP_EFFICIENCY.observe(efficiency(transfer.transfer_ms, transfer.exposed_ms))
        if transfer.conversion is not None:
            _observe(transfer.conversion)
        self._exposed_s = transfer.exposed_ms / 1e3

    def report(self) -> None:
        TOKENS.inc(self.num_tokens)
        if self._exposed_s is not None:
            REQUEST_SHARE.observe(self._exposed_s / max(1e-9, time.perf_counter() - self._began_s))
        if self.num_tokens > 1:
            TPOT_SECONDS.observe((self._last_s - self._first_s) / (self.num_tokens - 1))
