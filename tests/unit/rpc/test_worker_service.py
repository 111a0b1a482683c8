from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest

from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.worker_client import BlockChanges, WorkerStatus, get_status, watch_status
from sagellm_common.rpc.worker_service import BlockFeed
from tests.support.simulated_engine import SimulatedPool
from tests.support.topology import LAYOUT
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S
from tests.support.workers import Worker, decode_all, request, worker

A, B, C = (bytes([i]) * 16 for i in range(3))


class TestBlockFeed:
    def feed(self) -> tuple[SimulatedPool, BlockFeed]:
        pool = SimulatedPool(LAYOUT, 4)
        return pool, BlockFeed(pool)

    def test_each_watcher_gets_each_change_once(self) -> None:
        pool, feed = self.feed()
        first, held = feed.subscribe()
        assert held == []
        pool.cache._tell(BlockEvent(stored=(A,)))
        second, _ = feed.subscribe()
        pool.cache._tell(BlockEvent(stored=(B,)))
        assert feed.take(first) == BlockEvent(stored=(A, B))
        assert feed.take(first) == BlockEvent()
        assert feed.take(second) == BlockEvent(stored=(B,))

    def test_a_backlog_keeps_the_last_state_of_each_block(self) -> None:
        pool, feed = self.feed()
        key, _ = feed.subscribe()
        pool.cache._tell(BlockEvent(stored=(A, B)))
        pool.cache._tell(BlockEvent(removed=(A,)))
        pool.cache._tell(BlockEvent(removed=(C,)))
        pool.cache._tell(BlockEvent(stored=(C,)))
        assert feed.take(key) == BlockEvent(stored=(B, C), removed=(A,))

    def test_who_left_is_forgotten(self) -> None:
        pool, feed = self.feed()
        key, _ = feed.subscribe()
        feed.unsubscribe(key)
        pool.cache._tell(BlockEvent(stored=(A,)))
        with pytest.raises(KeyError):
            feed.take(key)


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
        assert (changes.revision, changes.snapshot, changes.removed) == (1, True, ())
        held = set(changes.stored)
        assert held == set(decode.engine.kv.cached_hashes())
        assert len(held) == 5

        await decode_all(decode, request(range(50, 54), request_id="r2"), [1], None)
        held |= {h for h in await until_held(watch, status, decode.engine.kv.cached_hashes()) if h not in held}
        assert held == set(decode.engine.kv.cached_hashes())


async def until_held(watch: Any, status: WorkerStatus, wanted: list[bytes]) -> set[bytes]:
    """The hashes told until all of `wanted` that were not known before are in; revisions must be without gaps."""
    told: set[bytes] = set()
    revision = 1
    changes: BlockChanges
    while not told or status.running_requests:
        status, changes = await anext(watch)
        revision += 1
        assert (changes.revision, changes.snapshot) == (revision, False)
        told |= set(changes.stored)
        told -= set(changes.removed)
    return told


async def test_watch_says_nothing_when_nothing_changes_and_hears_of_evictions(decode: Worker) -> None:
    await decode_all(decode, request(range(1, 15)), [1], None)
    watch = cast("Any", watch_status(decode.channel, min_interval_s=0.01))
    async with aclosing(watch):
        _, first = await anext(watch)
        decode.engine.kv.forget()
        status, changes = await anext(watch)
        assert changes == BlockChanges(revision=2, snapshot=False, stored=(), removed=changes.removed)
        assert set(changes.removed) == set(first.stored)
        assert status.kv.cached_blocks == 0
