from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole
from sagellm_common.prefix_reuse.hashing import unpack_hashes
from sagellm_common.rpc import codec
from sagellm_common.rpc.block_journal import BlockChanges
from sagellm_common.rpc.worker_client import WorkerStatus, get_status, watch_status
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S
from tests.support.workers import Worker, decode_all, request, worker


@pytest.fixture
async def decode() -> AsyncIterator[Worker]:
    async with topology_server(EmbeddedTopology()) as router, worker(WorkerRole.DECODE, router) as made:
        yield made


async def test_status(decode: Worker) -> None:
    await decode.decode_session.reserve(request(range(1, 15)), 1, timeout_s=TIMEOUT_S)
    status = await get_status(decode.channel, timeout_s=TIMEOUT_S)
    assert status.record == decode.runtime.record
    assert (status.kv.total_blocks, status.kv.used_blocks, status.reservations) == (64, 4, 1)
    assert status.running_requests == status.waiting_requests == status.pinned_transfers == 0


async def test_watch_gives_the_state_then_its_changes(decode: Worker) -> None:
    await decode_all(decode, request(range(1, 15)), [1], None)
    watch = cast("Any", watch_status(decode.channel, min_interval_s=0.01))
    async with aclosing(watch):
        status, changes = await anext(watch)
        assert (changes.since, changes.snapshot, changes.more, changes.removed) == (0, True, False, b"")
        held = set(unpack_hashes(changes.stored))
        assert held == set(decode.engine.kv.cached_hashes())
        assert len(held) == 5

        await decode_all(decode, request(range(50, 54), request_id="r2"), [1], None)
        held |= {h for h in await told_until_idle(watch, status, changes.revision) if h not in held}
        assert held == set(decode.engine.kv.cached_hashes())


async def told_until_idle(watch: Any, status: WorkerStatus, revision: int) -> set[bytes]:
    """The hashes told until nothing runs; each message builds on the one before."""
    told: set[bytes] = set()
    changes: BlockChanges
    while not told or status.running_requests:
        status, changes = await anext(watch)
        assert (changes.since, changes.snapshot) == (revision, False)
        assert changes.age_s >= 0
        revision = changes.revision
        told |= set(unpack_hashes(changes.stored))
        told -= set(unpack_hashes(changes.removed))
    return told


async def test_watch_says_nothing_when_nothing_changes_and_hears_of_evictions(decode: Worker) -> None:
    await decode_all(decode, request(range(1, 15)), [1], None)
    watch = cast("Any", watch_status(decode.channel, min_interval_s=0.01))
    async with aclosing(watch):
        _, first = await anext(watch)
        decode.engine.kv.forget()
        status, changes = await anext(watch)
        assert (changes.since, changes.snapshot, changes.stored) == (first.revision, False, b"")
        assert set(unpack_hashes(changes.removed)) == set(unpack_hashes(first.stored))
        assert status.kv.cached_blocks == 0


async def test_a_watch_goes_on_where_another_stopped(decode: Worker) -> None:
    await decode_all(decode, request(range(1, 15)), [1], None)
    incarnation = decode.runtime.record.incarnation
    async with aclosing(cast("Any", watch_status(decode.channel, min_interval_s=0.01))) as watch:
        _, first = await anext(watch)
    resumed = {"from_revision": first.revision, "incarnation": incarnation}
    async with aclosing(cast("Any", watch_status(decode.channel, min_interval_s=0.01, **resumed))) as watch:
        _, changes = await anext(watch)
        assert changes == BlockChanges(first.revision, first.revision)  # the status is told all the same
    await decode_all(decode, request(range(50, 54), request_id="r2"), [1], None)
    async with aclosing(cast("Any", watch_status(decode.channel, min_interval_s=0.01, **resumed))) as watch:
        _, changes = await anext(watch)
        assert (changes.since, changes.snapshot) == (first.revision, False)
        held = {*unpack_hashes(first.stored), *unpack_hashes(changes.stored)}
        assert held == set(decode.engine.kv.cached_hashes())
    stranger = {"from_revision": first.revision, "incarnation": "another"}
    async with aclosing(cast("Any", watch_status(decode.channel, min_interval_s=0.01, **stranger))) as watch:
        _, changes = await anext(watch)
        assert changes.snapshot
        assert set(unpack_hashes(changes.stored)) == held


async def test_a_watch_gives_a_sign_of_life(decode: Worker) -> None:
    watch = cast("Any", watch_status(decode.channel, min_interval_s=0.01, max_interval_s=0.02))
    async with aclosing(watch):
        first, changes = await anext(watch)
        for _ in range(3):
            assert await anext(watch) == (first, BlockChanges(changes.revision, changes.revision))


async def test_a_watch_tells_each_step_of_the_engine_once(decode: Worker) -> None:
    steps = [StepCost(0.5, prompts=1, prompt_tokens=3, prompt_squares=9), StepCost(0.25, 0, 0, 0, 2, 7, 0.125)]
    decode.engine.step_log.add(steps[0])
    watch = cast("Any", watch_status(decode.channel, min_interval_s=0.01))
    async with aclosing(watch):
        status, _ = await anext(watch)
        assert status.steps == (), "what was before nobody asked for"
        for step in steps:
            decode.engine.step_log.add(step)
        status, changes = await anext(watch)
        assert status.steps == tuple(steps)
        assert changes == BlockChanges(changes.revision, changes.revision)
        decode.engine.step_log.add(steps[1])
        status, _ = await anext(watch)
        assert status.steps == (steps[1],)


@pytest.mark.parametrize(
    "wrong", [StepCost(-1.0, prompts=1), StepCost(float("nan"), prompts=1), StepCost(1.0), StepCost(1.0, 1, -1)]
)
def test_what_no_step_can_have_been_is_refused(wrong: StepCost) -> None:
    with pytest.raises(InvalidRequest, match="steps"):
        codec.decode_step_cost(codec.encode_step_cost(wrong))
