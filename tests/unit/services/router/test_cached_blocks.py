"""What the router believes of its workers' caches, for how long, and what it says of that."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import IndexConfig
from sagellm_common.core.kv import KvRegion, Tier
from sagellm_common.kv_runtime.host_cache import HostCache
from sagellm_common.kv_runtime.pool import KVPool
from sagellm_common.rpc.block_journal import BlockChanges, BlockJournal
from services.router import cached_blocks
from services.router.cached_blocks import CachedBlocks, EventsMissed
from tests.support import kv_tiers

A, B, C, D = (bytes([i]) * 16 for i in range(4))
X = ("x", "x-1")


class Told:
    """CachedBlocks, and worker x, whose first incarnation is watched."""

    def __init__(self, **config: float) -> None:
        self.clock = ManualClock()
        self.blocks = CachedBlocks(IndexConfig.model_validate(config), self.clock)
        self.blocks.watched(*X)

    async def tell(self, revision: int, since: int, stored: bytes = b"", **more: object) -> None:
        await self.blocks.apply(*X, BlockChanges(revision, since, stored=stored, **more))  # type: ignore[arg-type]

    async def list_all(self, revision: int, stored: bytes, **more: object) -> None:
        await self.tell(revision, 0, stored, snapshot=True, **more)

    async def follow(self, journal: BlockJournal, from_revision: int) -> None:
        for changes in journal.after(from_revision):
            await self.blocks.apply(*X, changes)

    def matched(self, hashes: bytes = A + B + C + D) -> dict[str, int]:
        return self.blocks.matched(hashes, 16)


async def test_a_listing_and_the_changes_after_it() -> None:
    told = Told()
    await told.list_all(5, A + B)
    await told.tell(6, 5, C, tier=Tier.HOST)
    assert told.matched() == {"x": 48}
    await told.tell(7, 6, removed=B)
    assert told.matched() == {"x": 16}
    await told.list_all(9, D)
    assert told.matched() == {}
    assert told.matched(D) == {"x": 16}


@pytest.mark.parametrize(
    ("revision", "since"), [(7, 6), (6, 4), (6, 0)], ids=["a gap", "another past", "builds on nothing"]
)
async def test_changes_that_do_not_build_on_what_is_known_are_refused(revision: int, since: int) -> None:
    told = Told()
    await told.list_all(5, A)
    with pytest.raises(EventsMissed):
        await told.tell(revision, since, B)
    assert told.matched() == {"x": 16}


async def test_parts_of_a_listing_count_as_they_come_but_it_is_known_with_the_last() -> None:
    told = Told()
    await told.list_all(5, C + D, more=True)
    assert told.blocks.watched(*X) == 0  # the connection broke: it is all told again
    await told.list_all(6, C + D, more=True)
    with pytest.raises(EventsMissed):
        await told.tell(7, 0, A + B)
    await told.tell(6, 0, A + B)
    assert (told.matched(), told.blocks.watched(*X)) == ({"x": 64}, 6)


async def test_changes_of_which_a_part_is_missing_are_told_again() -> None:
    told = Told()
    await told.list_all(5, A)
    await told.tell(8, 5, B, more=True)
    assert told.blocks.watched(*X) == 5
    await told.tell(9, 5, B + C)
    assert (told.matched(), told.blocks.watched(*X)) == ({"x": 48}, 9)


async def test_a_broken_watch_gets_no_credit_and_goes_on_where_it_stopped() -> None:
    told = Told()
    await told.list_all(5, A)
    told.blocks.unwatched(*X)
    assert told.matched() == {}
    assert told.blocks.watched(*X) == 5
    assert told.matched() == {}  # until it says something
    await told.tell(5, 5)
    assert told.matched() == {"x": 16}


async def test_who_is_silent_for_too_long_gets_no_credit() -> None:
    told = Told(max_staleness_s=3.0)
    await told.list_all(5, A, age_s=0.25)
    assert told.blocks.sign_of_life_s == 1.0
    told.clock.advance(3.0)
    assert told.matched() == {"x": 16}
    told.clock.advance(0.1)
    assert told.matched() == {}
    view = told.blocks.view(*X)
    assert view is not None
    assert (view.revision, view.blocks, view.credited, view.lag_ms) == (5, 1, False, 250.0)
    assert view.staleness_ms == pytest.approx(3100)
    await told.tell(5, 5)
    assert told.matched() == {"x": 16}
    assert told.blocks.view("x", "x-1").lag_ms == 250.0  # type: ignore[union-attr]


async def test_incarnations_do_not_share_what_they_hold() -> None:
    told = Told()
    await told.list_all(5, A + B)
    assert told.blocks.watched("x", "x-2") == 0
    await told.blocks.apply("x", "x-2", BlockChanges(1, snapshot=True, stored=A))
    told.blocks.forget(*X)
    told.blocks.forget(*X)
    assert told.matched() == {"x": 16}
    assert told.blocks.view(*X) is None


async def test_a_long_listing_lets_others_have_their_turn_and_ends_when_the_worker_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cached_blocks, "PIECE_BYTES", 16)
    told = Told()
    listing = asyncio.create_task(told.list_all(5, A + B + C + D))
    seen = []
    for _ in range(3):
        await asyncio.sleep(0)
        seen.append(told.blocks._index.metrics.blocks)
    assert seen == [1, 2, 3]
    told.blocks.forget(*X)
    await listing
    assert told.blocks._index.metrics.blocks == 0


async def test_a_prefix_in_several_tiers_of_a_worker_counts_as_one() -> None:
    """An engine's pool over host memory, as the router hears of it."""
    told, size = Told(), kv_tiers.BLOCK_TOKENS
    memory = KvRegion(memoryview(bytearray(6 * kv_tiers.BLOCK_BYTES)), kv_tiers.BLOCK_BYTES, 6)
    pool = KVPool()
    pool.open(kv_tiers.LAYOUT, memory)
    pool.keep_below(HostCache(16 * kv_tiers.BLOCK_BYTES, kv_tiers.LAYOUT, told.clock))
    journal = BlockJournal(pool, told.clock, 1000, Tier.DEVICE)
    await told.follow(journal, 0)

    for first_token in (0, 100):
        token_ids = kv_tiers.chain(5, first_token)[1]
        allocation = pool.allocate(token_ids, len(token_ids))
        pool.publish(allocation, token_ids)
        pool.free(allocation)
    hashes, _ = kv_tiers.chain(5)
    on_device = len(set(hashes) & set(pool.cached_hashes()))
    assert 0 < on_device < 5
    for from_revision in (1, 0):  # what came since, and everything
        await told.follow(journal, from_revision)
        (depths,) = told.blocks._index.lookup(b"".join(hashes)).values()
        assert (depths[Tier.DEVICE], depths[Tier.HOST]) == (on_device, 5)
        assert told.blocks.matched(b"".join(hashes), size) == {"x": 5 * size}


async def test_metrics() -> None:
    told, registry = Told(max_blocks=2), CollectorRegistry()
    registry.register(told.blocks)
    await told.list_all(5, A + B + C, age_s=0.5)
    told.blocks.watched("silent", "1")
    told.clock.advance(1.0)
    told.matched()
    told.matched(D)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"sagellm_router_index_{name}", labels)

    counted = ("blocks", "lookups_total", "queried_blocks_total", "matched_blocks_total", "matched_tokens_total")
    assert [value(name) for name in counted] == [2, 2, 5, 2, 32]
    assert value("forgotten_blocks_total") == 1
    assert value("block_bytes") == value("bytes") / 2  # type: ignore[operator]
    assert value("staleness_seconds", worker_id="x") == 1.0
    assert value("lag_seconds", worker_id="x") == 0.5
    assert value("staleness_seconds", worker_id="silent") is None
    assert value("worker_blocks", worker_id="x", tier="device") == 2
    assert value("worker_blocks", worker_id="x", tier="host") == 0
