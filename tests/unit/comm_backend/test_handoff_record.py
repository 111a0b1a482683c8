from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.comm_backend import meter
from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget, Side
from sagellm_common.comm_backend.handoff_reason import HandoffReason
from sagellm_common.comm_backend.handoff_record import MAX_EVENTS, HandoffLog, State
from sagellm_common.comm_backend.meter import current
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import KvExhausted, LeaseExpired, PeerLost
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvSource
from sagellm_common.rpc.handoffs import decode_record, encode_record

TTL_S = 10.0
TABLE = np.array([1, 2], dtype=np.int32)
SOURCE = KvSource("r", 77, "prefill-0", "life-1", "host:1", "host:2", "tcp", TABLE, 8, 10_000, 2, 8)


class Fixture:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.log = HandoffLog(self.clock, "tcp", "why not", kept=4)
        free = [].append
        self.source = HandoffSource(TTL_S, self.clock, free, observer=self.log)
        self.target = HandoffTarget(TTL_S, self.clock, free, observer=self.log)


@pytest.fixture
def it() -> Fixture:
    return Fixture()


def blocks() -> Allocation:
    return Allocation(TABLE)


@pytest.mark.parametrize("by", ["router", "decode"])
def test_a_source_tells_when_what_was_read_and_who_ended_it(it: Fixture, by: str) -> None:
    epoch = it.source.new_epoch(3)
    it.source.pin("r", epoch, blocks(), 8)
    it.clock.advance(0.5)
    meter.digested(7.0)  # of something else, before
    with it.source.reading("r", epoch, TABLE, 64):
        it.clock.advance(0.25)
        meter.digested(0.125)
    it.source.release("r", epoch, committed=by == "decode", by=by)  # type: ignore[arg-type]
    it.source.release("r", epoch, committed=False)
    it.clock.advance(1.0)
    (record,) = it.log.records()
    assert (record.attempt, record.epoch, record.side, record.bytes) == (3, epoch, Side.SOURCE, 64)
    assert (record.queued_ms, record.transfer_ms, record.total_ms, record.age_ms) == (500, 250, 750, 1750)
    assert record.digest_ms == 125
    expected = (State.DONE, None) if by == "decode" else (State.CANCELLED, HandoffReason.CANCELLED_BY_ROUTER)
    assert (record.state, record.reason) == expected
    assert [event.at_ms for event in record.events] == [0, 750, 750]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("expire", HandoffReason.LEASE_EXPIRED),
        ("close", HandoffReason.DRAINING),
        ("replace", HandoffReason.EPOCH_FENCED),
        ("router", HandoffReason.CANCELLED_BY_ROUTER),
        ("client", HandoffReason.CANCELLED_BY_CLIENT),
    ],
)
def test_every_end_of_a_reservation_has_its_reason(it: Fixture, end: str, reason: HandoffReason) -> None:
    it.target.reserve("r", 1, blocks())
    if end == "expire":
        it.clock.advance(TTL_S)
        it.target.expire()
    elif end == "close":
        it.target.close()
    elif end == "replace":
        it.target.reserve("r", 2, blocks())
    else:
        it.target.release("r", 1, end)  # type: ignore[arg-type]
    assert it.log.records()[0].reason is reason
    assert [r.attempt for r in it.log.records(failed=True)] == [1]


def test_a_pull_that_fails_and_one_that_makes_up_for_it(it: Fixture) -> None:
    it.target.reserve("r", 1, blocks())
    it.clock.advance(0.1)
    with pytest.raises(PeerLost), it.log.pulling("r", 1, SOURCE, "pull ahead"):
        current().arrived(10)
        raise PeerLost("gone")
    it.target.claim("r", 1)
    it.log.called("r", 1, SOURCE)
    with it.log.pulling("r", 1, SOURCE, "pull") as pulling:
        it.clock.advance(0.2)
        pulling.agreed()
        with current().digesting():
            current().arrived(20)
    it.log.done("r", 1, blocks=2, reused=1, transfer_ms=40, exposed_ms=10, ahead_share=0.75)
    (record,) = it.log.records("r")
    assert (record.state, record.reason, record.retries, record.bytes) == (State.DONE, None, 1, 30)
    assert (record.queued_ms, record.handshake_ms, record.overlap_share) == (
        pytest.approx(100),
        pytest.approx(200),
        0.75,
    )
    assert record.digest_ms > 0
    assert (record.peer_id, record.epoch) == ("prefill-0", 77)
    assert "pull ahead fails: peer_lost_after_first_byte" in [event.what for event in record.events]


def test_the_first_word_on_a_failure_counts(it: Fixture) -> None:
    it.target.reserve("r", 1, blocks())
    it.clock.advance(TTL_S)
    it.target.expire()
    it.log.called("r", 1, SOURCE)
    assert it.log.failed("r", 1, LeaseExpired("not leased here")) is None
    (record,) = it.log.records()
    assert (record.reason, record.failed_at) == (HandoffReason.LEASE_EXPIRED, Side.TARGET)


def test_what_could_not_be_reserved_is_kept_too(it: Fixture) -> None:
    it.log.refused("r", 1, KvExhausted("full"))
    (record,) = it.log.records(failed=True)
    assert (record.reason, record.message, record.failed_at) == (HandoffReason.KV_EXHAUSTED, "full", Side.TARGET)


def test_the_ring_forgets_the_oldest_also_if_it_runs(it: Fixture) -> None:
    for n in range(6):
        it.target.reserve(f"r{n}", 1, blocks())
    assert [record.request_id for record in it.log.records()] == ["r2", "r3", "r4", "r5"]
    it.target.release("r0", 1)
    assert [record.request_id for record in it.log.records(last=1)] == ["r5"]
    assert len(it.log._running) == 4


def test_a_record_does_not_grow_for_ever(it: Fixture) -> None:
    it.target.reserve("r", 1, blocks())
    for _ in range(2 * MAX_EVENTS):
        it.log.called("r", 1, SOURCE)
    assert len(it.log.records()[0].events) == MAX_EVENTS


def test_a_record_crosses_the_wire_as_it_is(it: Fixture) -> None:
    it.target.reserve("r", 1, blocks())
    it.clock.advance(TTL_S)
    it.target.expire()
    it.target.reserve("r2", 1, blocks())
    for record in it.log.records():
        record.began_s = 0.0
        assert decode_record(encode_record(record)) == record
