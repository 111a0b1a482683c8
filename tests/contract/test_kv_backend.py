"""What every pool of KV blocks does (`KVBackendProtocol`). A new pool is one more `make_…` in POOLS."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import ConfigError, KvExhausted, Overloaded, TenantQuota
from sagellm_common.core.kv import Allocation, BlockEvent, BlockMoves, KvRegion
from sagellm_common.core.types import KvStats, TokenIds
from sagellm_common.engines.lmdeploy import hooks
from sagellm_common.kv_policy.eviction import EVICTION
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.mock import MockKvPool
from sagellm_common.kv_runtime.integrity import check
from sagellm_common.kv_runtime.pool import KVPool
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.kv_channels import a_layout

NUM_BLOCKS, BLOCK_TOKENS, BLOCK_BYTES = 16, 4, 64
LAYOUT = a_layout(BLOCK_BYTES, BLOCK_TOKENS)
TENANTS = {"gold": TenantConfig(guaranteed=0.25), "small": TenantConfig(limit=0.25)}


@dataclass(frozen=True)
class Pool:
    backend: KVBackendProtocol
    cache: Callable[[TokenIds], None]
    """Puts the full blocks of these tokens into the prefix cache, and holds none of them."""


def make_host() -> Pool:
    pool = HostKvPool(NUM_BLOCKS * BLOCK_BYTES, ManualClock(), LAYOUT, tenants=TENANTS)

    def cache(token_ids: TokenIds) -> None:
        hashes = block_hashes(token_ids, BLOCK_TOKENS, root_hash(LAYOUT))
        pool.commit_put(pool.begin_put(hashes, token_ids[: len(hashes) * BLOCK_TOKENS]))

    return Pool(pool, cache)


def make_mock() -> Pool:
    pool = MockKvPool(LAYOUT, NUM_BLOCKS, tenants=TENANTS)
    return Pool(pool, publishing(pool))


def publishing(pool: KVPool) -> Callable[[TokenIds], None]:
    def cache(token_ids: TokenIds) -> None:
        allocation = pool.allocate(token_ids, len(token_ids))
        pool.publish(allocation, token_ids)
        pool.free(allocation)

    return cache


def make_lmdeploy() -> Pool:
    """Through the hooks, where LMDeploy is patched."""
    hooks.enable()
    return _over_a_scheduler()


def make_lmdeploy_without_hooks() -> Pool:
    if not hooks.available():
        return _over_a_scheduler()
    from lmdeploy.pytorch.extension import EXT

    with mock.patch.multiple(EXT, **dict.fromkeys(hooks.HOOKS)):
        return _over_a_scheduler()


def _over_a_scheduler() -> Pool:
    from lmdeploy.pytorch.config import CacheConfig, SchedulerConfig
    from lmdeploy.pytorch.paging.scheduler import Scheduler

    from sagellm_common.engines.lmdeploy.block_manager import manager_of
    from sagellm_common.engines.lmdeploy.kv_manager import LmdeployKvPool, SequencePrefix

    scheduler = Scheduler(
        SchedulerConfig(max_batches=4, max_session_len=64),
        CacheConfig(4, BLOCK_TOKENS, 0, NUM_BLOCKS, device_type="cpu", num_state_caches=0),
    )
    memory = KvRegion(memoryview(bytearray(NUM_BLOCKS * BLOCK_BYTES)), BLOCK_BYTES, NUM_BLOCKS)
    pool = LmdeployKvPool(manager_of(scheduler), scheduler, LAYOUT, memory, True, tenants=TENANTS)

    def cache(token_ids: TokenIds) -> None:
        allocation = pool.allocate(token_ids, len(token_ids))
        with pool.lock:
            pool.cache.publish(SequencePrefix(root_hash(LAYOUT)), token_ids, allocation.table, len(token_ids))
        pool.free(allocation)

    return Pool(pool, cache)


def make_vllm() -> Pool:
    """The pool beside vLLM's pages, filled as that engine does it; it needs no vLLM."""
    pool = HostKvPool(NUM_BLOCKS * BLOCK_BYTES, ManualClock(), LAYOUT, "engine.num_blocks", tenants=TENANTS)
    return Pool(pool, publishing(pool))


POOLS = [make_host, make_mock, make_lmdeploy, make_lmdeploy_without_hooks, make_vllm]


@pytest.fixture(params=POOLS, ids=lambda make: make.__name__.removeprefix("make_"))
def pool(request: pytest.FixtureRequest) -> Pool:
    made: Pool = request.param()
    return made


def tokens(count: int, start: int = 0) -> TokenIds:
    return np.arange(start, start + count, dtype=np.int32)


def stats(pool: Pool) -> KvStats:
    counted = pool.backend.get_utilization()
    assert counted.balanced, counted
    return counted


def used_free_cached(pool: Pool) -> tuple[int, int, int]:
    counted = stats(pool)
    return counted.used_blocks, counted.free_blocks, counted.cached_blocks


def test_regions_and_layout(pool: Pool) -> None:
    region = pool.backend.regions()
    assert (region.num_blocks, region.block_bytes) == (NUM_BLOCKS, BLOCK_BYTES)
    assert pool.backend.layout == LAYOUT
    region.block(3)[:] = bytes(range(BLOCK_BYTES))
    assert pool.backend.regions().block(3).tobytes() == bytes(range(BLOCK_BYTES))
    assert region.view.nbytes == NUM_BLOCKS * BLOCK_BYTES
    with pytest.raises(IndexError):
        region.block(NUM_BLOCKS)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (64, 16)])
def test_allocates_blocks_for_tokens(pool: Pool, num_tokens: int, num_blocks: int) -> None:
    allocation = pool.backend.allocate(tokens(num_tokens), num_tokens)
    ids = allocation.block_ids.tolist()
    assert len(set(ids)) == len(ids) == num_blocks
    assert set(ids) <= set(range(NUM_BLOCKS))
    assert (allocation.num_cached_tokens, allocation.num_shared_blocks) == (0, 0)
    assert used_free_cached(pool) == (num_blocks, NUM_BLOCKS - num_blocks, 0)
    pool.backend.free(allocation)
    assert used_free_cached(pool) == (0, NUM_BLOCKS, 0)


def test_free_is_idempotent(pool: Pool) -> None:
    first = pool.backend.allocate(tokens(8), 8)
    pool.backend.free(first)
    second = pool.backend.allocate(tokens(8), 8)
    pool.backend.free(first)
    assert used_free_cached(pool) == (2, NUM_BLOCKS - 2, 0)
    pool.backend.free(second)
    pool.backend.free(second)
    assert used_free_cached(pool) == (0, NUM_BLOCKS, 0)


def test_shared_blocks_are_held_until_each_holder_has_freed_them(pool: Pool) -> None:
    pool.cache(tokens(8))
    mine = pool.backend.allocate(tokens(14), 14)
    theirs = pool.backend.share(mine)
    assert theirs.block_ids.tolist() == mine.block_ids.tolist()
    assert (
        (theirs.num_cached_tokens, theirs.num_shared_blocks)
        == (mine.num_cached_tokens, mine.num_shared_blocks)
        == (8, 2)
    )
    before = used_free_cached(pool)
    pool.backend.free(mine)
    pool.backend.free(mine)
    assert used_free_cached(pool) == before
    others = pool.backend.allocate(tokens(12 * BLOCK_TOKENS, start=1000), 12 * BLOCK_TOKENS)
    assert set(others.block_ids.tolist()).isdisjoint(theirs.block_ids.tolist())
    pool.backend.free(others)
    pool.backend.free(theirs)
    pool.backend.free(theirs)
    assert used_free_cached(pool)[0] == 0
    assert pool.backend.get_utilization().balanced


def test_what_does_not_fit_takes_nothing(pool: Pool) -> None:
    pool.cache(tokens(8))
    held = pool.backend.allocate(tokens(40, start=500), 40)
    before = used_free_cached(pool)
    with pytest.raises(Overloaded) as caught:
        pool.backend.allocate(np.concatenate([tokens(8), tokens(20, start=900)]), 28)
    assert caught.value.retry_after_s
    used, free, cached = used_free_cached(pool)
    assert used == before[0]
    assert free + cached == NUM_BLOCKS - used
    pool.backend.free(held)


def test_a_cached_prefix_is_shared(pool: Pool) -> None:
    prompt = tokens(11)
    pool.cache(prompt)
    assert used_free_cached(pool) == (0, NUM_BLOCKS - 2, 2)
    one = pool.backend.allocate(prompt, 13)
    two = pool.backend.allocate(np.concatenate([prompt[:4], tokens(8, start=700)]), 12)
    assert (one.num_cached_tokens, one.num_shared_blocks) == (8, 2)
    assert (two.num_cached_tokens, two.num_shared_blocks) == (4, 1)
    assert one.block_ids[0] == two.block_ids[0]
    assert len({*one.block_ids.tolist(), *two.block_ids.tolist()}) == 4 + 3 - 1
    assert used_free_cached(pool) == (6, NUM_BLOCKS - 6, 0)
    pool.backend.free(one)
    assert used_free_cached(pool) == (3, NUM_BLOCKS - 4, 1)
    pool.backend.free(two)
    assert used_free_cached(pool) == (0, NUM_BLOCKS - 2, 2)


def test_a_hit_leaves_a_token_to_compute(pool: Pool) -> None:
    pool.cache(tokens(8))
    allocation = pool.backend.allocate(tokens(8), 9)
    assert allocation.num_cached_tokens == 4
    pool.backend.free(allocation)


def test_another_salt_shares_nothing(pool: Pool) -> None:
    pool.cache(tokens(12))
    allocation = pool.backend.allocate(tokens(12), 12, cache_salt="tenant")
    assert allocation.num_cached_tokens == 0
    pool.backend.free(allocation)


def test_what_is_cached_is_lent_whole_and_nothing_else(pool: Pool) -> None:
    pool.cache(tokens(12))
    lent = pool.backend.lend(tokens(12))
    assert (lent.num_cached_tokens, lent.num_shared_blocks, len(lent.block_ids)) == (12, 3, 3)
    assert used_free_cached(pool) == (3, NUM_BLOCKS - 3, 0)
    others = pool.backend.allocate(tokens(13 * BLOCK_TOKENS, start=500), 13 * BLOCK_TOKENS)
    assert set(others.block_ids.tolist()).isdisjoint(lent.block_ids.tolist())
    pool.backend.free(others)
    pool.backend.free(lent)
    pool.backend.free(lent)
    for unknown in (pool.backend.lend(tokens(12), "tenant"), pool.backend.lend(tokens(12, start=700))):
        assert (unknown.num_cached_tokens, len(unknown.block_ids)) == (0, 0)
        pool.backend.free(unknown)
    assert used_free_cached(pool)[0] == 0


def test_eviction_knows_what_a_block_costs_by_its_depth(pool: Pool) -> None:
    def costs() -> list[float]:
        cache = pool.backend.cache  # type: ignore[attr-defined]
        return sorted(cache.policy._blocks[block_hash].cost for block_hash in pool.backend.cached_hashes())

    pool.backend.set_eviction("cost-aware")
    pool.cache(tokens(8))
    assert costs() == [1.0, 1.0], "nothing is known yet"
    pool.backend.price(lambda depth: 1.0 + 2.0 * depth)
    pool.cache(tokens(12, start=100))
    assert costs() == [1.0, 1.0, 1.0, 3.0, 5.0]
    pool.backend.set_eviction("adaptive")
    assert costs() == [1.0, 1.0, 3.0, 3.0, 5.0], "a new policy asks anew"


def test_allocation_evicts_what_nobody_holds(pool: Pool) -> None:
    pool.cache(tokens(5 * BLOCK_TOKENS + 1))
    held = pool.backend.allocate(tokens(9), 9)
    assert held.num_shared_blocks == 2
    everything_else = pool.backend.allocate(tokens(13 * BLOCK_TOKENS, start=1000), 13 * BLOCK_TOKENS)
    assert set(held.block_ids.tolist()).isdisjoint(everything_else.block_ids.tolist())
    assert used_free_cached(pool) == (NUM_BLOCKS, 0, 0)
    assert set(pool.backend.cached_hashes()) == set(block_hashes(tokens(8), BLOCK_TOKENS, root_hash(LAYOUT)))
    pool.backend.free(held)
    pool.backend.free(everything_else)


def test_a_prefix_is_evicted_from_its_end(pool: Pool) -> None:
    pool.cache(tokens(6 * BLOCK_TOKENS))
    filler = pool.backend.allocate(tokens(13 * BLOCK_TOKENS, start=1000), 13 * BLOCK_TOKENS)
    pool.backend.free(filler)
    again = pool.backend.allocate(tokens(6 * BLOCK_TOKENS), 6 * BLOCK_TOKENS)
    assert again.num_shared_blocks == 3
    pool.backend.free(again)


def test_watchers_see_the_cache_as_it_is(pool: Pool) -> None:
    seen: set[bytes] = set()

    def follow(event: BlockEvent) -> None:
        assert seen.isdisjoint(event.stored)
        assert seen.issuperset(event.removed)
        seen.difference_update(event.removed)
        seen.update(event.stored)

    pool.backend.watch(follow)
    for start in range(0, 500, 50):
        pool.cache(tokens(20, start=start))
        pool.cache(tokens(12, start=start))
        assert seen == set(pool.backend.cached_hashes())
    assert seen
    pool.backend.free(pool.backend.allocate(tokens(NUM_BLOCKS * BLOCK_TOKENS, start=9000), NUM_BLOCKS * BLOCK_TOKENS))
    assert seen == set(pool.backend.cached_hashes()) == set()


def test_threads_do_not_get_each_others_blocks(pool: Pool) -> None:
    owners: dict[int, int] = {}
    lock = threading.Lock()
    wrong: list[str] = []

    def worker(number: int) -> None:
        held: list[Allocation] = []
        for turn in range(100):
            try:
                allocation = pool.backend.allocate(tokens(8, start=1000 * number + 10 * turn), 8)
            except Overloaded:
                continue
            with lock:
                ids = allocation.block_ids.tolist()
                wrong.extend(f"block {b} is {owners[b]}'s" for b in ids if owners.setdefault(b, number) != number)
            held.append(allocation)
            if len(held) > 1:
                release(held.pop(0))
        for allocation in held:
            release(allocation)

    def release(allocation: Allocation) -> None:
        with lock:
            for block in allocation.block_ids.tolist():
                owners.pop(block, None)
        pool.backend.free(allocation)

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert used_free_cached(pool) == (0, NUM_BLOCKS, 0)


def test_nothing_is_allocated_for_nothing(pool: Pool) -> None:
    allocation: Allocation = pool.backend.allocate(tokens(0), 0)
    assert allocation.block_ids.size == 0
    pool.backend.free(allocation)
    assert used_free_cached(pool) == (0, NUM_BLOCKS, 0)


def test_another_eviction_policy_loses_no_block_and_can_give_up_all(pool: Pool) -> None:
    backend = pool.backend
    for start in (0, 100, 200):
        pool.cache(tokens(16, start=start))
    before = set(backend.cached_hashes())
    assert len(before) == 12
    for name in EVICTION:
        backend.set_eviction(name)
        assert backend.eviction == name
        assert set(backend.cached_hashes()) == before
    with pytest.raises(ConfigError, match="unknown eviction policy 'oldest'; known: adaptive,"):
        backend.set_eviction("oldest")
    assert backend.eviction == name
    everything = backend.allocate(tokens(NUM_BLOCKS * BLOCK_TOKENS, start=1000), NUM_BLOCKS * BLOCK_TOKENS)
    assert used_free_cached(pool) == (NUM_BLOCKS, 0, 0)
    backend.free(everything)


def moves(*pairs: tuple[int, int]) -> BlockMoves:
    sources, destinations = zip(*pairs, strict=True)
    return BlockMoves(np.array(sources, np.int32), np.array(destinations, np.int32))


def free_places(pool: Pool) -> list[int]:
    found = pool.backend.get_block_info(np.arange(NUM_BLOCKS, dtype=np.int32))
    return [info.block_id for info in found if not info.ref_count]


def places(pool: Pool, token_ids: TokenIds) -> list[int]:
    """Where the cached blocks of these tokens are."""
    hashes = block_hashes(token_ids, BLOCK_TOKENS, root_hash(LAYOUT))
    found = pool.backend.get_block_info(np.arange(NUM_BLOCKS, dtype=np.int32))
    by_hash = {info.block_hash: info.block_id for info in found}
    return [by_hash[key] for key in hashes]


def test_block_info_tells_who_has_a_block(pool: Pool) -> None:
    pool.cache(tokens(8))
    held = pool.backend.allocate(tokens(14), 14, tenant="gold")
    infos = pool.backend.get_block_info(held.block_ids)
    hashes = block_hashes(tokens(8), BLOCK_TOKENS, root_hash(LAYOUT))
    assert [info.block_id for info in infos] == held.block_ids.tolist()
    assert [info.block_hash for info in infos] == [*hashes, None, None]
    assert [info.ref_count for info in infos] == [2, 2, 1, 1]
    assert [info.tenant for info in infos] == ["default", "default", "gold", "gold"]
    assert all(info.pinned for info in infos)
    (free,) = pool.backend.get_block_info(np.array(free_places(pool)[:1], np.int32))
    assert (free.ref_count, free.block_hash, free.pinned, free.tenant) == (0, None, False, "")
    assert pool.backend.get_block_info(np.empty(0, np.int32)) == []
    with pytest.raises(IndexError):
        pool.backend.get_block_info(np.array([NUM_BLOCKS], np.int32))
    pool.backend.free(held)


def test_a_moved_block_is_found_in_its_new_place_with_its_bytes(pool: Pool) -> None:
    pool.cache(tokens(12))
    region = pool.backend.regions()
    before = places(pool, tokens(12))
    for n, place in enumerate(before):
        region.block(place)[:] = bytes([n + 1]) * BLOCK_BYTES
    targets = free_places(pool)[-3:]
    assert pool.backend.migrate(moves(*zip(before, targets, strict=True))) == 3
    assert places(pool, tokens(12)) == targets
    held = pool.backend.allocate(tokens(13), 13)
    assert held.block_ids[:3].tolist() == targets
    assert [region.block(place)[0] for place in targets] == [1, 2, 3]
    assert used_free_cached(pool) == (4, NUM_BLOCKS - 4, 0)
    pool.backend.free(held)


def test_what_must_stay_stays(pool: Pool) -> None:
    pool.cache(tokens(8))
    cached = places(pool, tokens(8))
    held = pool.backend.allocate(tokens(8, start=100), 8)
    one, two, three, four = free_places(pool)[:4]
    pinned = int(held.block_ids[0])
    plan = moves((pinned, one), (cached[0], int(held.block_ids[1])), (two, three), (cached[1], four))
    assert pool.backend.migrate(plan) == 1
    assert held.block_ids[0] == pinned
    assert places(pool, tokens(8)) == [cached[0], four]
    assert stats(pool).used_blocks == 2
    assert pool.backend.migrate(BlockMoves.none()) == 0
    pool.backend.free(held)


def test_fragmentation_counts_slots_without_tokens_and_scattered_free_blocks(pool: Pool) -> None:
    whole = pool.backend.get_fragmentation()
    assert (whole.internal, whole.external, whole.longest_free_run_blocks) == (0.0, 0.0, NUM_BLOCKS)
    held = [pool.backend.allocate(tokens(n, start=100 * n), n) for n in (4, 5, 8)]  # 1 + 2 + 2 blocks, 3 slots unused
    found = pool.backend.get_fragmentation()
    assert found.internal == pytest.approx(3 / 20)
    assert found.external == 0.0
    pool.backend.free(held[1])
    found = pool.backend.get_fragmentation()
    assert (found.internal, found.free_blocks, found.longest_free_run_blocks) == (0.0, 13, 11)
    assert found.external == pytest.approx(1 - 11 / 13)
    for allocation in held:
        pool.backend.free(allocation)


def test_defragmentation_closes_the_gaps_between_cached_blocks(pool: Pool) -> None:
    backend = pool.backend
    assert isinstance(backend, KVPool)
    apart = [backend.allocate(tokens(4, start=100 * n), 4) for n in range(NUM_BLOCKS // 2)]
    for n in range(NUM_BLOCKS // 2):
        pool.cache(tokens(4, start=1000 + 100 * n))
        backend.free(apart[n])
        apart.append(backend.allocate(tokens(4, start=100 * n), 4)) if n % 2 else None
    for allocation in apart:
        backend.free(allocation)
    region, hashes = backend.regions(), backend.cached_hashes()
    contents = {}
    for info in backend.get_block_info(np.arange(NUM_BLOCKS, dtype=np.int32)):
        if info.block_hash is not None:
            contents[info.block_hash] = region.block(info.block_id)[:] = info.block_hash * (BLOCK_BYTES // 16)
    while backend.defragment(2 * BLOCK_BYTES):
        assert backend.get_utilization().balanced
    assert backend.get_fragmentation().external == 0.0
    assert set(backend.cached_hashes()) == set(hashes)
    for info in backend.get_block_info(np.arange(NUM_BLOCKS, dtype=np.int32)):
        assert info.block_hash is None or region.block(info.block_id).tobytes() == contents[info.block_hash]
    row = backend.allocate(tokens(28, start=5000), 28).block_ids
    assert np.diff(row).tolist() == [1] * (len(row) - 1)


def test_an_allocation_grows_with_fresh_blocks(pool: Pool) -> None:
    held = pool.backend.allocate(tokens(5), 5)
    before = held.block_ids.tolist()
    pool.backend.extend(held, 8)
    assert held.block_ids.tolist() == before
    pool.backend.extend(held, 13)
    assert held.block_ids.tolist()[:2] == before
    assert len(set(held.block_ids.tolist())) == 4
    with pytest.raises(Overloaded):
        pool.backend.extend(held, NUM_BLOCKS * BLOCK_TOKENS + 1)
    assert used_free_cached(pool) == (4, NUM_BLOCKS - 4, 0)
    pool.backend.free(held)
    with pytest.raises(ValueError, match="freed or handed over"):
        pool.backend.extend(held, 20)


def test_who_writes_into_a_shared_partial_block_gets_its_own_copy(pool: Pool) -> None:
    """Two sequences go on from token 6, in the middle of the second block."""
    region = pool.backend.regions()
    one = pool.backend.allocate(tokens(6), 6)
    for place in one.block_ids.tolist():
        region.block(place)[:] = bytes([place]) * BLOCK_BYTES
    two = pool.backend.share(one)
    assert pool.backend.make_writable(two, begin_token=6) == 1
    assert two.block_ids[0] == one.block_ids[0]
    assert two.block_ids[1] != one.block_ids[1]
    assert region.block(int(two.block_ids[1])) == region.block(int(one.block_ids[1]))
    assert pool.backend.make_writable(one, begin_token=6) == 0  # its alone by now
    assert used_free_cached(pool) == (3, NUM_BLOCKS - 3, 0)
    pool.backend.free(one)
    assert used_free_cached(pool)[0] == 2
    pool.backend.free(two)
    assert used_free_cached(pool) == (0, NUM_BLOCKS, 0)


def test_cached_blocks_are_not_written_in_place(pool: Pool) -> None:
    pool.cache(tokens(8))
    held = pool.backend.allocate(tokens(9), 9)
    assert held.num_shared_blocks == 2
    assert pool.backend.make_writable(held, begin_token=4) == 1
    assert held.num_shared_blocks == 1
    assert places(pool, tokens(8))[1] != held.block_ids[1]
    assert used_free_cached(pool) == (3, NUM_BLOCKS - 4, 1)
    pool.backend.free(held)


def test_a_copy_for_which_there_is_no_room_changes_nothing(pool: Pool) -> None:
    one = pool.backend.allocate(tokens(NUM_BLOCKS * BLOCK_TOKENS), NUM_BLOCKS * BLOCK_TOKENS)
    two = pool.backend.share(one)
    before = two.block_ids.tolist()
    with pytest.raises(Overloaded):
        pool.backend.make_writable(two, begin_token=0)
    assert two.block_ids.tolist() == before
    pool.backend.free(one)
    pool.backend.free(two)
    assert used_free_cached(pool) == (0, NUM_BLOCKS, 0)


def test_tenants_have_their_limits_and_their_guarantees(pool: Pool) -> None:
    with pytest.raises(TenantQuota, match="tenant 'small' wants 5 more KV blocks"):
        pool.backend.allocate(tokens(20), 20, tenant="small")
    small = pool.backend.allocate(tokens(16), 16, tenant="small")
    others = pool.backend.allocate(tokens(40, start=100), 40)
    with pytest.raises(KvExhausted):
        pool.backend.allocate(tokens(16, start=200), 16, tenant="gold")
    pool.backend.free(small)
    with pytest.raises(TenantQuota, match="while 'gold' waits"):
        pool.backend.allocate(tokens(4, start=300), 4)
    gold = pool.backend.allocate(tokens(16, start=200), 16, tenant="gold")
    for allocation in (others, gold):
        pool.backend.free(allocation)


def test_the_books_are_right_whatever_was_done(pool: Pool) -> None:
    assert isinstance(pool.backend, KVPool)
    pool.cache(tokens(20))
    held = [pool.backend.allocate(tokens(n), n) for n in (3, 9, 18)]
    held.append(pool.backend.share(held[1]))
    pool.backend.make_writable(held[3], 8)
    pool.backend.free(held[0])
    assert check(pool.backend, pool.backend.cached_hashes()).problems == ()
    for allocation in held:
        pool.backend.free(allocation)
    assert check(pool.backend, pool.backend.cached_hashes()).problems == ()
