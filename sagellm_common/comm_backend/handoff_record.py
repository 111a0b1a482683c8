"""One record per handoff and side: what happened when, how much moved, and who failed why. The last ones are kept.

    source   a lease table tells: announced, pinned, read, ended
    target   a lease table tells: reserved, ended; decode tells: pulls, the Decode call, how it ended

Times are milliseconds since a record's beginning, and that lies `age_ms` back when it is asked for: the clocks of two
machines are never compared.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from sagellm_common.comm_backend.handoff import Party, Side, attempt_of
from sagellm_common.comm_backend.handoff_reason import HandoffReason, reason_of
from sagellm_common.comm_backend.meter import PullMeter, metering
from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvSource

KEPT = 256
"""Records of one worker; older ones are forgotten."""
MAX_EVENTS = 64
"""Of one record. Later ones are not kept: the last word is in its fields."""


class State(enum.StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class HandoffEvent:
    what: str
    at_ms: float


@dataclass(slots=True)
class HandoffRecord:
    """`peer_id` is empty at a source: it does not know who pulls. `failed_at` is the side that failed, as seen here."""

    request_id: str
    attempt: int
    epoch: int
    side: Side
    began_s: float
    """Of the worker's own clock."""
    backend: str = ""
    backend_why: str = ""
    peer_id: str = ""
    peer_incarnation: str = ""
    state: State = State.RUNNING
    reason: HandoffReason | None = None
    failed_at: str = ""
    message: str = ""
    queued_ms: float = 0.0
    """Target: reserved, until the first pull. Source: pinned or announced, until the first read."""
    handshake_ms: float = 0.0
    first_byte_ms: float = 0.0
    """Since the first pull began."""
    transfer_ms: float = 0.0
    """In which bytes moved."""
    exposed_ms: float = 0.0
    """From the Decode call until all was here."""
    digest_ms: float = 0.0
    bytes: int = 0
    blocks_moved: int = 0
    blocks_reused: int = 0
    stalls: int = 0
    longest_stall_ms: float = 0.0
    retries: int = 0
    """Pulls of the same KV again."""
    overlap_share: float = 0.0
    """Of transfer_ms, what was hidden behind the computation: bytes that came before the Decode call / all bytes."""
    total_ms: float = 0.0
    """From beginning to end; of a running one, so far."""
    age_ms: float = 0.0
    """Since the beginning, when it was asked for."""
    events: list[HandoffEvent] = field(default_factory=list)


class HandoffLog:
    """A `handoff.LeaseObserver` of a worker's lease tables, too. Thread-safe; it calls nobody.

    `backend_why` says how `backend` was chosen.
    """

    def __init__(self, clock: Clock, backend: str, backend_why: str, kept: int = KEPT) -> None:
        self._clock = clock
        self._backend = backend
        self._backend_why = backend_why
        self._lock = threading.Lock()
        self._kept: deque[HandoffRecord] = deque(maxlen=kept)
        self._running: dict[tuple[Side, str, int], HandoffRecord] = {}

    def records(self, request_id: str = "", last: int = 0, failed: bool = False) -> list[HandoffRecord]:
        """Copies, oldest first: of one request, the last ones, those that ended other than well."""
        now_s = self._clock.now()
        with self._lock:
            found = [
                replace(record, events=list(record.events), age_ms=(now_s - record.began_s) * 1e3)
                for record in self._kept
                if (not request_id or record.request_id == request_id)
                and (not failed or record.state in (State.FAILED, State.CANCELLED))
            ]
        for record in found:
            if record.state is State.RUNNING:
                record.total_ms = record.age_ms
        return found[-last:] if last else found

    # ---- what lease tables tell ----

    def entered(self, side: Side, key: str, epoch: int, allocation: Allocation, what: str) -> None:
        with self._lock:
            record = self._running.get((side, key, epoch)) or self._begin(side, key, epoch)
            if side is Side.TARGET:
                record.blocks_reused = allocation.num_shared_blocks
            self._event(record, what)

    def read(self, key: str, epoch: int, num_blocks: int, num_bytes: int, seconds: float, digest_s: float) -> None:
        """A source has sent, `seconds` long."""
        with self._lock:
            # The receiver may have all of it, and say so, before the sender has returned.
            record = self._running.get((Side.SOURCE, key, epoch)) or self._ended(Side.SOURCE, key, epoch)
            if record is None:
                return
            if not record.bytes:
                record.queued_ms = max(0.0, self._at_ms(record) - seconds * 1e3)
                self._event(record, "first segment sent")
            record.bytes += num_bytes
            record.transfer_ms += seconds * 1e3
            record.digest_ms += digest_s * 1e3
            record.blocks_moved = max(record.blocks_moved, num_blocks)

    def ended(self, side: Side, key: str, epoch: int, outcome: str, by: Party) -> None:
        """A lease: committed, cancelled (by router, prefill or decode), expired, replaced, closed or claimed."""
        with self._lock:
            record = self._running.get((side, key, epoch))
            if record is None:
                return
            self._event(record, f"{outcome} by {by}" if by else outcome)
            if outcome == "committed":
                self._end(record, State.DONE)
            elif outcome != "claimed":
                reason, failed_at = _LEASE_ENDS.get(outcome, (_CANCELLED_BY.get(by, HandoffReason.INTERNAL), by))
                state = State.CANCELLED if reason.cancelled else State.FAILED
                self._end(record, state, reason, failed_at or side, f"the lease was {outcome}" + (by and f" by {by}"))

    # ---- what decode tells ----

    def refused(self, request_id: str, attempt: int, error: SageError) -> HandoffRecord:
        """Nothing could be reserved."""
        with self._lock:
            record = self._begin(Side.TARGET, request_id, attempt)
            self._event(record, "reserve refused")
            self._end(record, State.FAILED, reason_of(error), Side.TARGET, error.message)
            return record

    @contextmanager
    def pulling(self, request_id: str, attempt: int, source: KvSource, what: str) -> Iterator[Pulling]:
        """A pull, for the time of the block, whatever ends it."""
        with self._lock:
            record = self._of(request_id, attempt)
            again = any(event.what.startswith("pull") for event in record.events)
            record.peer_id, record.peer_incarnation = source.worker_id, source.incarnation
            record.backend, record.epoch = source.backend, source.epoch
            if again:
                record.retries += 1
            else:
                record.queued_ms = self._at_ms(record)
            self._event(record, f"{what} begins")
        pulling = Pulling(self._clock)
        try:
            with metering() as meter:
                yield pulling
        except BaseException as err:
            with self._lock:
                self._add(record, pulling, meter)
                self._event(record, f"{what} fails: {reason_of(err, record.bytes)}")
            raise
        with self._lock:
            self._add(record, pulling, meter)
            self._event(record, f"{what} is done")

    def called(self, request_id: str, attempt: int, source: KvSource) -> None:
        """Decode is called for it."""
        with self._lock:
            record = self._of(request_id, attempt)
            record.peer_id, record.peer_incarnation, record.epoch = source.worker_id, source.incarnation, source.epoch
            self._event(record, "decode is called")

    def done(
        self,
        request_id: str,
        attempt: int,
        *,
        blocks: int,
        reused: int,
        transfer_ms: float,
        exposed_ms: float,
        ahead_share: float,
    ) -> HandoffRecord | None:
        """All KV is here and counts; `ahead_share` of its bytes came before the Decode call."""
        with self._lock:
            record = self._running.get((Side.TARGET, request_id, attempt))
            if record is None:
                return None
            record.blocks_moved, record.blocks_reused = blocks, reused
            record.transfer_ms, record.exposed_ms = transfer_ms, exposed_ms
            record.overlap_share = ahead_share
            self._event(record, "all KV is here")
            self._end(record, State.DONE)
            return record

    def failed(self, request_id: str, attempt: int, error: BaseException) -> HandoffRecord | None:
        """The Decode call ended before its KV was there. None: there was no handoff, or its end is known."""
        with self._lock:
            record = self._running.get((Side.TARGET, request_id, attempt))
            if record is None:
                return None
            reason = reason_of(error, record.bytes)
            message = error.message if isinstance(error, SageError) else repr(error)
            self._event(record, f"fails: {reason}")
            by_client = reason is HandoffReason.CANCELLED_BY_CLIENT
            canceller = "client" if by_client else "router"
            failed_at = canceller if reason.cancelled else _FAILED_AT.get(reason, Side.SOURCE)
            self._end(record, State.CANCELLED if reason.cancelled else State.FAILED, reason, failed_at, message)
            return record

    # ---- with the lock held ----

    def _of(self, request_id: str, attempt: int) -> HandoffRecord:
        """The target's record: running, or ended before its Decode call came, or else a new one."""
        for record in reversed(self._kept):
            if (record.side, record.request_id, record.attempt) == (Side.TARGET, request_id, attempt):
                if record.state is not State.DONE:
                    return record
                break
        return self._begin(Side.TARGET, request_id, attempt)

    def _ended(self, side: Side, key: str, epoch: int) -> HandoffRecord | None:
        kept = (one for one in reversed(self._kept) if (one.side, one.request_id, one.epoch) == (side, key, epoch))
        return next(kept, None)

    def _begin(self, side: Side, key: str, epoch: int) -> HandoffRecord:
        attempt = attempt_of(epoch) if side is Side.SOURCE else epoch
        record = HandoffRecord(key, attempt, epoch, side, self._clock.now(), self._backend, self._backend_why)
        if len(self._kept) == self._kept.maxlen:
            oldest = self._kept[0]
            self._running = {of: one for of, one in self._running.items() if one is not oldest}
        self._kept.append(record)
        self._running[side, key, epoch] = record
        return record

    def _end(
        self,
        record: HandoffRecord,
        state: State,
        reason: HandoffReason | None = None,
        failed_at: str = "",
        message: str = "",
    ) -> None:
        record.state, record.reason, record.failed_at, record.message = state, reason, failed_at, message
        record.total_ms = self._at_ms(record)
        self._running = {of: one for of, one in self._running.items() if one is not record}

    def _add(self, record: HandoffRecord, pulling: Pulling, meter: PullMeter) -> None:
        record.handshake_ms += pulling.handshake_ms
        if pulling.result is not None and pulling.result.backend:
            record.backend, record.backend_why = pulling.result.backend, pulling.result.why or record.backend_why
        if not record.first_byte_ms and meter.first_byte_s is not None:
            record.first_byte_ms = meter.first_byte_s * 1e3
        record.bytes += meter.bytes
        record.stalls += meter.stalls
        record.longest_stall_ms = max(record.longest_stall_ms, meter.longest_stall_s * 1e3)
        record.digest_ms += meter.digest_s * 1e3

    def _event(self, record: HandoffRecord, what: str) -> None:
        if len(record.events) < MAX_EVENTS:
            record.events.append(HandoffEvent(what, self._at_ms(record)))

    def _at_ms(self, record: HandoffRecord) -> float:
        return (self._clock.now() - record.began_s) * 1e3


class Pulling:
    """One pull under way. `result` is what came of it: it names the byte path taken, and where it was chosen, why."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._began_s, self.handshake_ms = clock, clock.now(), 0.0
        self.result: TransferResult | None = None

    def agreed(self) -> None:
        """The handshake is done."""
        self.handshake_ms = (self._clock.now() - self._began_s) * 1e3


_LEASE_ENDS = {
    "expired": (HandoffReason.LEASE_EXPIRED, ""),
    "replaced": (HandoffReason.EPOCH_FENCED, "router"),
    "closed": (HandoffReason.DRAINING, ""),
}
_CANCELLED_BY = {
    "client": HandoffReason.CANCELLED_BY_CLIENT,
    "router": HandoffReason.CANCELLED_BY_ROUTER,
    "prefill": HandoffReason.CANCELLED_BY_PREFILL,
    "decode": HandoffReason.CANCELLED_BY_DECODE,
}
_FAILED_AT = {
    HandoffReason.DEADLINE: "router",
    HandoffReason.INVALID_REQUEST: "router",
    HandoffReason.KV_EXHAUSTED: Side.TARGET,
    HandoffReason.QUEUE_FULL: Side.TARGET,
    HandoffReason.DRAINING: Side.TARGET,
    HandoffReason.ENGINE_FAILED: Side.TARGET,
    HandoffReason.INTERNAL: Side.TARGET,
}
"""Which side the target holds responsible; the source, for all others."""
