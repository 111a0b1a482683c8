"""What the handoff doctor says of handoffs made to fail in every way, over real services with a simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from sagellm_common.comm_backend.backends import socket_receiver
from sagellm_common.comm_backend.handoff_reason import HandoffReason
from sagellm_common.comm_backend.handoff_record import State
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import InvalidRequest, KvCorrupt, KvExhausted, LeaseExpired, PeerLost, SageError
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import KvSource, WorkerRole
from sagellm_common.rpc.handoffs import list_handoffs
from services.cli import doctor
from tests.support.simulated_engine import SimulatedEngine
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S
from tests.support.workers import Worker, decode_all, generate, request, test_config, worker

PROMPT = list(range(1, 15))


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@pytest.fixture
def clock() -> ManualClock:
    """Of the leases."""
    return ManualClock()


@pytest.fixture
async def prefill(router: str, clock: ManualClock) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL, router, clock=clock) as made:
        yield made


@pytest.fixture
async def decode(router: str, clock: ManualClock) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, router, clock=clock) as made:
        yield made


async def only(router: str, **which: object) -> tuple[doctor.Handoff, doctor.Findings]:
    found = await doctor.examine(router, None, **which)  # type: ignore[arg-type]
    assert len(found.handoffs) == 1, found.handoffs
    return found.handoffs[0], found


async def ended(router: str) -> tuple[doctor.Handoff, doctor.Findings]:
    """The only handoff, once both sides that are there have ended it."""

    async def now() -> list[State]:
        handoffs = (await doctor.examine(router, None)).handoffs
        return [side.record.state for handoff in handoffs for side in handoff.sides]

    async with asyncio.timeout(TIMEOUT_S):
        while State.RUNNING in (await now() or [State.RUNNING]):  # noqa: ASYNC110 - over the wire
            await asyncio.sleep(0.005)
    return await only(router)


async def pinned(prefill: Worker, decode: Worker) -> KvSource:
    """Reserved and prefilled."""
    ticket = await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(request(PROMPT), 1, ticket, timeout_s=TIMEOUT_S)
    assert first.source is not None
    return first.source


async def fails(decode: Worker, source: KvSource | None, error: type[SageError]) -> None:
    with pytest.raises(error):
        await decode_all(decode, request(PROMPT), [1], source)


async def test_one_that_went_well(router: str, prefill: Worker, decode: Worker) -> None:
    await generate(prefill, decode, request(PROMPT))
    await prefill.idle()  # the sender has returned
    handoff, found = await ended(router)
    assert (handoff.state, handoff.reason, found.not_asked) == (State.DONE, None, {})
    assert (handoff.source_id, handoff.target_id) == ("prefill-0", "decode-0")
    target, source = handoff.target.record, handoff.source.record  # type: ignore[union-attr]
    assert target.bytes == source.bytes == 4 * decode.engine.kv.layout.block_bytes
    assert (target.blocks_moved, target.blocks_reused, target.retries, target.stalls) == (4, 0, 0, 0)
    assert target.epoch == source.epoch
    assert (target.backend, target.backend_why) == ("tcp", "transport.backend says so")
    assert 0 < target.first_byte_ms <= target.total_ms
    assert target.handshake_ms > 0 < target.digest_ms
    told = [what for _, _, what in handoff.timeline()]
    assert set(told) >= {"reserved", "computed and pinned", "pull begins", "first segment sent", "all KV is here"}
    assert doctor.diagnosis(handoff, found)[1] == "", "nothing is to be done"
    assert "came over tcp" in doctor.diagnosis(handoff, found)[0]


async def test_blocks_that_are_there_need_not_move(router: str, prefill: Worker, decode: Worker) -> None:
    await generate(prefill, decode, request(PROMPT))
    await decode.idle()
    await generate(prefill, decode, request(PROMPT, request_id="again"))
    handoff, _ = await only(router, request_id="again")
    assert handoff.target is not None
    assert (handoff.target.record.blocks_moved, handoff.target.record.blocks_reused) == (1, 3)


async def test_lease_expired(router: str, prefill: Worker, decode: Worker, clock: ManualClock) -> None:
    source = await pinned(prefill, decode)
    clock.advance(prefill.leases.ttl_s)
    prefill.leases.expire()
    decode.reservations.expire()
    await fails(decode, source, LeaseExpired)
    handoff, found = await ended(router)
    assert handoff.reason is HandoffReason.LEASE_EXPIRED
    assert "ran out" in doctor.diagnosis(handoff, found)[0]


async def test_epoch_fenced(router: str, prefill: Worker, decode: Worker) -> None:
    source = await pinned(prefill, decode)
    stale = replace(source, epoch=source.epoch - 1)
    await fails(decode, stale, LeaseExpired)
    handoff, _ = await only(router, failed=True)
    assert handoff.target is not None
    assert handoff.target.record.reason is HandoffReason.EPOCH_FENCED
    prefill.leases.close()


async def test_connect_refused(router: str, prefill: Worker, decode: Worker) -> None:
    source = await pinned(prefill, decode)
    await fails(decode, replace(source, data_address="127.0.0.1:1"), PeerLost)
    handoff, found = await ended(router)
    assert handoff.reason is HandoffReason.CONNECT_REFUSED
    assert "prefill-0 took no connection" in doctor.diagnosis(handoff, found)[0]


async def test_peer_restarted(router: str, prefill: Worker, decode: Worker) -> None:
    source = await pinned(prefill, decode)
    await fails(decode, replace(source, incarnation="its-life-before"), PeerLost)
    handoff, _ = await ended(router)
    assert handoff.reason is HandoffReason.PEER_RESTARTED


async def test_digest_mismatch(router: str, prefill: Worker, decode: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(*_: object) -> None:
        raise KvCorrupt("block 3 arrived with another digest")

    source = await pinned(prefill, decode)
    monkeypatch.setattr(socket_receiver, "verify_digests", corrupt)
    await fails(decode, source, KvCorrupt)
    handoff, found = await ended(router)
    assert handoff.reason is HandoffReason.DIGEST_MISMATCH
    assert handoff.culprit is not None
    assert (handoff.culprit.worker_id, handoff.culprit.record.failed_at) == ("decode-0", "source")
    assert "never used" in doctor.diagnosis(handoff, found)[0]


async def test_kv_exhausted(router: str) -> None:
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(num_blocks=4)) as decode:
        await decode.decode_session.reserve(request(PROMPT, request_id="first"), 1, timeout_s=TIMEOUT_S)
        with pytest.raises(KvExhausted):
            await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
        handoff, found = await only(router, failed=True)
        assert (handoff.any.request_id, handoff.reason) == ("r1", HandoffReason.KV_EXHAUSTED)
        assert "decode.num_blocks" in doctor.diagnosis(handoff, found)[1]


@pytest.mark.parametrize(("when", "by_client"), [("reserved", False), ("pinned", False), ("pinned", True)])
async def test_cancelled_by_the_router_or_its_client(
    router: str, prefill: Worker, decode: Worker, when: str, by_client: bool
) -> None:
    if when == "reserved":
        await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
    else:
        await pinned(prefill, decode)
        prefill.prefill_session.cancel("r1", 1, by_client=by_client)
    decode.decode_session.cancel("r1", 1, by_client=by_client)
    decode.decode_session.cancel("r1", 1, by_client=by_client)
    handoff, _ = await ended(router)
    reason = HandoffReason.CANCELLED_BY_CLIENT if by_client else HandoffReason.CANCELLED_BY_ROUTER
    assert (handoff.state, handoff.reason) == (State.CANCELLED, reason)
    await decode.idle()
    await prefill.idle()


async def test_workers_that_cannot_be_asked_are_named(router: str, prefill: Worker, decode: Worker) -> None:
    await generate(prefill, decode, request(PROMPT))
    await ended(router)
    await prefill.runtime._server.stop(0)  # type: ignore[union-attr]
    handoff, found = await only(router)
    assert handoff.source is None
    assert handoff.source_id == "prefill-0"
    assert list(found.not_asked) == ["prefill-0"]
    assert handoff.reason is None


async def test_the_ring_is_bounded_and_counts_are_checked(decode: Worker) -> None:
    for n in range(300):
        request_id = f"r{n}"
        await decode.decode_session.reserve(request([1, 2], request_id=request_id), 1, timeout_s=TIMEOUT_S)
        decode.decode_session.release(request_id, 1)
    await decode.idle()
    _, kept = await list_handoffs(decode.channel, timeout_s=TIMEOUT_S)
    assert [record.request_id for record in kept] == [f"r{n}" for n in range(300 - 256, 300)]
    _, two = await list_handoffs(decode.channel, last=2, failed=True, timeout_s=TIMEOUT_S)
    assert [record.request_id for record in two] == ["r298", "r299"]
    with pytest.raises(InvalidRequest, match="last"):
        await list_handoffs(decode.channel, last=-1, timeout_s=TIMEOUT_S)


async def test_pulled_ahead(router: str) -> None:
    """Overlap on: the record tells of both pulls and how much was hidden."""
    config = test_config("transport.overlap_min_bytes=0")
    async with (
        worker(WorkerRole.PREFILL, router, config=config) as prefill,
        worker(WorkerRole.DECODE, router, config=config) as decode,
    ):
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)

        def pull_ahead(source: KvSource) -> None:
            decode.decode_session.pull_ahead("r1", 1, source, timeout_s=TIMEOUT_S)

        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S, on_started=pull_ahead)
        await decode_all(decode, wanted, first.token_ids, first.source)
        handoff, _ = await ended(router)
        told = [what for _, _, what in handoff.timeline()]
        assert told.index("pull ahead begins") < told.index("pull ahead is done") < told.index("all KV is here")
        assert told.index("announced") < told.index("computed and pinned")
        assert handoff.reason is None
