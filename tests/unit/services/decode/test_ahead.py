"""Pulls that begin before their Decode call: who owns the blocks, whatever comes in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sagellm_common.comm_backend.handoff import HandoffTarget
from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import KvCorrupt, LeaseExpired, PeerLost, SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvSource
from services.decode.ahead import PullsAhead
from services.decode.jobs import PullAheadJob
from tests.support.waiting import eventually

TABLE = np.array([4, 5, 6], dtype=np.int32)
SOURCE = KvSource("r", 1, "prefill-0", "life-1", "host:1", "host:2", "tcp", TABLE, 12, 10_000, 2, 0)
TTL_S = 60.0
RESULT = TransferResult(bytes=128, seconds=0.5, blocks=2)


class Pool:
    """Frees."""

    def __init__(self) -> None:
        self.freed: list[Allocation] = []

    def free(self, allocation: Allocation) -> None:
        self.freed.append(allocation)


class Puller:
    """Pulls until it is told how that ends; a cancelled one takes until `quiet` to stop writing."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[TransferResult] = asyncio.get_running_loop().create_future()
        self.quiet = asyncio.Event()
        self.quiet.set()

    async def pull_ahead(
        self, job: PullAheadJob, allocation: Allocation, on_bytes: Callable[[int], None]
    ) -> TransferResult:
        on_bytes(64)
        try:
            return await asyncio.shield(self.outcome)
        finally:
            await self.quiet.wait()


class Fixture:
    def __init__(self) -> None:
        self.pool, self.puller, self.clock = Pool(), Puller(), ManualClock()
        self.reservations = HandoffTarget(TTL_S, self.clock, self.pool.free)
        self.aheads = PullsAhead(self.reservations, self.puller)  # type: ignore[arg-type]

    def reserved(self, attempt: int = 1) -> Allocation:
        allocation = Allocation(np.array([7, 8, 9], dtype=np.int32), num_cached_tokens=4, num_shared_blocks=1)
        return self.reservations.reserve("r", attempt, allocation)

    def start(self, attempt: int = 1) -> None:
        self.aheads.start(PullAheadJob("r", attempt, SOURCE, timeout_s=10.0))


@pytest.fixture
async def it() -> Fixture:
    return Fixture()


async def test_taken_once_all_of_it_is_here(it: Fixture) -> None:
    blocks = it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    await eventually(lambda: ahead.bytes_here == 64)
    assert (len(it.reservations), len(it.aheads)) == (1, 1)
    taking = asyncio.create_task(it.aheads.take(ahead))
    it.puller.outcome.set_result(RESULT)
    assert await taking is blocks
    transfer = ahead.transfer(replace(SOURCE, tokens_ready=12), 12, blocks)
    assert transfer is not None
    assert (transfer.bytes, transfer.transfer_ms, transfer.blocks, transfer.blocks_reused) == (128, 500.0, 2, 1)
    assert blocks.num_cached_tokens == 12
    assert (len(it.reservations), len(it.aheads)) == (0, 0)
    assert it.pool.freed == []


@pytest.mark.parametrize("state", ["pulling", "here", "failed"])
@pytest.mark.parametrize("how", ["drop", "close", "restart"])
async def test_dropped_blocks_are_freed_once_nobody_writes(it: Fixture, state: str, how: str) -> None:
    blocks = it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    if state == "here":
        it.puller.outcome.set_result(RESULT)
        await asyncio.wait([ahead.task])
    elif state == "failed":
        it.puller.outcome.set_exception(PeerLost("gone"))
        await asyncio.wait([ahead.task])
    else:
        await eventually(lambda: ahead.bytes_here == 64)
        it.puller.quiet.clear()
    if how == "close":
        it.aheads.close()
        it.aheads.close()
    elif how == "drop":
        it.aheads.drop("r", 0)
        assert it.aheads.find("r", 1) is ahead, "an older attempt's word is no word"
        it.aheads.drop("r", 1)
        it.aheads.drop("r", 1)
    else:
        it.reserved(attempt=2)
        it.start(attempt=2)
        it.aheads.drop("r", 1)
        assert it.aheads.find("r", 2) is not None
    if state == "pulling":
        assert it.pool.freed == []
        it.puller.quiet.set()
    await eventually(lambda: it.pool.freed == [blocks])
    assert len(it.aheads) == (1 if how == "restart" else 0)
    it.aheads.close()


async def test_nobody_comes_for_it() -> None:
    """Its time begins when the pull is over, and it expires like any other."""
    it = Fixture()
    blocks = it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    await eventually(lambda: ahead.bytes_here == 64)
    it.clock.advance(2 * TTL_S)
    assert it.reservations.expire() == 0
    it.puller.outcome.set_result(RESULT)
    await asyncio.wait([ahead.task])
    it.clock.advance(TTL_S)
    assert it.reservations.expire() == 1
    assert it.pool.freed == [blocks]
    with pytest.raises(LeaseExpired):
        await it.aheads.take(ahead)
    assert it.pool.freed == [blocks]


async def test_cancelling_whoever_waits_drops_it(it: Fixture) -> None:
    blocks = it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    taking = asyncio.create_task(it.aheads.take(ahead))
    await eventually(lambda: ahead.bytes_here == 64)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    await eventually(lambda: it.pool.freed == [blocks])


async def test_released_under_whoever_waits(it: Fixture) -> None:
    it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    taking = asyncio.create_task(it.aheads.take(ahead))
    await eventually(lambda: ahead.bytes_here == 64)
    it.aheads.drop("r", 1)
    with pytest.raises(LeaseExpired, match="released"):
        await taking
    await eventually(lambda: len(it.pool.freed) == 1)


async def test_without_a_reservation_nothing_begins(it: Fixture) -> None:
    it.start()
    it.reserved(attempt=2)
    it.start(attempt=1)
    assert len(it.aheads) == 0
    assert len(it.reservations) == 1


@pytest.mark.parametrize("error", [PeerLost("gone"), LeaseExpired("moved"), KvCorrupt("bits")])
async def test_a_failure_is_pulled_again_or_told(it: Fixture, error: SageError) -> None:
    """Corrupt bytes are the one thing that is not tried again: the source's are suspect, too."""
    blocks = it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    it.puller.outcome.set_exception(error)
    assert await it.aheads.take(ahead) is blocks
    if isinstance(error, KvCorrupt):
        with pytest.raises(KvCorrupt):
            ahead.transfer(SOURCE, 12, blocks)
    else:
        assert ahead.transfer(SOURCE, 12, blocks) is None
    assert blocks.num_cached_tokens == 4


@pytest.mark.parametrize(
    "other",
    [
        {"epoch": 2},
        {"worker_id": "prefill-1"},
        {"incarnation": "life-2"},
        {"num_tokens": 11},
        {"block_table": TABLE[::-1]},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_what_came_from_another_source_does_not_count(it: Fixture, other: dict[str, object]) -> None:
    blocks = it.reserved()
    it.start()
    ahead = it.aheads.find("r", 1)
    assert ahead is not None
    it.puller.outcome.set_result(RESULT)
    await it.aheads.take(ahead)
    assert ahead.transfer(replace(SOURCE, **other), 12, blocks) is None  # type: ignore[arg-type]
    assert blocks.num_cached_tokens == 4
