from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import ConfigError, InvalidRequest, KvExhausted, LayoutMismatch
from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.types import BlockHash, TokenIds
from sagellm_common.kv_runtime.backends.host import HostKvPool, PendingPut
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.kv_channels import a_layout

LAYOUT = a_layout(block_bytes=64, block_size_tokens=4)
ROOT = root_hash(LAYOUT)


def chain(num_blocks: int, start: int = 0) -> tuple[list[BlockHash], TokenIds]:
    token_ids = np.arange(start, start + 4 * num_blocks, dtype=np.int32)
    return block_hashes(token_ids, 4, ROOT), token_ids


def make(num_blocks: int = 8) -> tuple[HostKvPool, ManualClock]:
    clock = ManualClock()
    return HostKvPool(num_blocks * 64, clock, LAYOUT), clock


def store(pool: HostKvPool, num_blocks: int, start: int = 0) -> PendingPut:
    put = pool.begin_put(*chain(num_blocks, start))
    pool.commit_put(put)
    return put


def counts(pool: HostKvPool) -> tuple[int, int, int]:
    stats = pool.get_utilization()
    assert stats.balanced, stats
    return stats.used_blocks, stats.free_blocks, stats.cached_blocks


def test_a_put_is_found_once_it_is_committed() -> None:
    pool, _ = make()
    hashes, token_ids = chain(3)
    put = pool.begin_put(hashes, token_ids)
    assert put.positions.tolist() == [0, 1, 2]
    assert counts(pool) == (3, 5, 0)
    assert pool.lookup(hashes) == 0
    assert pool.get(hashes, token_ids).block_ids.size == 0
    assert pool.cached_hashes() == []
    pool.commit_put(put)
    assert counts(pool) == (0, 5, 3)
    assert pool.lookup([*hashes, b"unknown unknown "]) == 3
    got = pool.get(hashes, token_ids)
    assert got.block_ids.tolist() == put.allocation.block_ids.tolist()
    assert (got.num_cached_tokens, got.num_shared_blocks) == (12, 3)
    assert counts(pool) == (3, 5, 0)
    pool.free(got)
    assert counts(pool) == (0, 5, 3)


def test_an_aborted_put_leaves_nothing() -> None:
    pool, _ = make()
    hashes, token_ids = chain(3)
    put = pool.begin_put(hashes, token_ids)
    pool.abort_put(put)
    pool.abort_put(put)
    pool.commit_put(put)
    assert counts(pool) == (0, 8, 0)
    assert pool.begin_put(hashes, token_ids).positions.tolist() == [0, 1, 2]


def test_abort_after_commit_is_a_no_op() -> None:
    pool, _ = make()
    pool.abort_put(store(pool, 2))
    assert counts(pool) == (0, 6, 2)


def test_only_absent_blocks_are_asked_for() -> None:
    pool, _ = make()
    store(pool, 2)
    hashes, token_ids = chain(4)
    first = pool.begin_put(hashes, token_ids)
    assert (first.positions.tolist(), first.num_present) == ([2, 3], 2)
    second = pool.begin_put(hashes, token_ids)
    assert (second.positions.tolist(), second.num_present) == ([], 2), "another put fills them already"
    pool.commit_put(second)
    assert pool.lookup(hashes) == 2
    pool.commit_put(first)
    assert pool.lookup(hashes) == 4
    assert counts(pool) == (0, 4, 4)


def test_a_hash_twice_in_a_put_is_one_block() -> None:
    pool, _ = make()
    hashes, token_ids = chain(1)
    put = pool.begin_put(hashes * 2, np.concatenate([token_ids, token_ids]))
    assert put.positions.tolist() == [0]


def test_a_hit_is_checked_against_the_tokens() -> None:
    pool, _ = make()
    store(pool, 3)
    hashes, token_ids = chain(3)
    token_ids = token_ids.copy()
    token_ids[5] += 1
    got = pool.get(hashes, token_ids)
    assert got.num_shared_blocks == 1
    pool.free(got)
    assert pool.outcomes["hit"] == 1 and pool.outcomes["missed"] == 2


@pytest.mark.parametrize("count", [11, 13, 0])
def test_tokens_must_match_the_hashes(count: int) -> None:
    pool, _ = make()
    hashes, _ = chain(3)
    with pytest.raises(InvalidRequest, match=f"token_ids has {count} tokens, but 3 block hashes stand for 12"):
        pool.get(hashes, np.zeros(count, dtype=np.int32))
    with pytest.raises(InvalidRequest):
        pool.begin_put(hashes, np.zeros(count, dtype=np.int32))
    assert counts(pool) == (0, 8, 0)


def test_a_put_beyond_the_budget_stores_its_head() -> None:
    pool, _ = make(4)
    put = store(pool, 6)
    assert put.positions.tolist() == [0, 1, 2, 3]
    assert pool.lookup(chain(6)[0]) == 4


def test_the_least_recently_used_goes_first_and_a_put_never_evicts_its_own_head() -> None:
    pool, _ = make(6)
    store(pool, 2, start=0)
    store(pool, 2, start=100)
    pool.free(pool.get(*chain(2, start=0)))
    store(pool, 4, start=200)
    assert pool.lookup(chain(2, start=0)[0]) == 2
    assert pool.lookup(chain(2, start=100)[0]) == 0
    # 2 + 4 blocks are full; extending the oldest chain must not eat its own beginning.
    put = store(pool, 6, start=0)
    assert (put.positions.tolist(), put.num_present) == ([2, 3, 4, 5], 2)
    assert pool.lookup(chain(6, start=0)[0]) == 6


def test_referenced_blocks_stay() -> None:
    pool, _ = make(4)
    store(pool, 2)
    held = pool.get(*chain(2))
    put = store(pool, 4, start=100)
    assert len(put.positions) == 2
    assert pool.lookup(chain(2)[0]) == 2
    pool.free(held)
    assert counts(pool) == (0, 0, 4)


def test_pins_keep_blocks_for_their_time() -> None:
    pool, clock = make(4)
    store(pool, 2)
    hashes, _ = chain(2)
    assert pool.pin([*hashes, b"unknown unknown "], ttl_s=10) == 2
    assert counts(pool) == (2, 2, 0)
    assert len(store(pool, 4, start=100).positions) == 2
    clock.advance(5)
    assert pool.pin(hashes, ttl_s=10) == 2, "pinning again prolongs"
    clock.advance(5)
    assert counts(pool) == (2, 0, 2)
    clock.advance(5)
    assert counts(pool) == (0, 0, 4)
    assert len(store(pool, 4, start=200).positions) == 4


def test_pins_have_their_bound() -> None:
    pool, _ = make(4)
    store(pool, 4)
    hashes, _ = chain(4)
    assert pool.pin(hashes[2:], ttl_s=10, most_blocks=1) == 1
    assert pool.pin(hashes, ttl_s=10, most_blocks=3) == 3, "the first of them, and the one that was pinned before"
    assert counts(pool) == (3, 0, 1)
    assert pool.pin(hashes, ttl_s=0, most_blocks=3) == 0
    assert pool.pin(hashes, ttl_s=10, most_blocks=0) == 0
    assert counts(pool) == (0, 0, 4)


def test_unpinning() -> None:
    pool, _ = make()
    store(pool, 2)
    hashes, _ = chain(2)
    pool.pin(hashes, ttl_s=10)
    assert pool.pin(hashes, ttl_s=0) == 0
    assert pool.pin(hashes, ttl_s=0) == 0
    assert counts(pool) == (0, 6, 2)


def test_watchers_are_told_in_order() -> None:
    pool, _ = make(2)
    events: list[BlockEvent] = []
    pool.watch(events.append)
    store(pool, 2)
    store(pool, 1, start=100)
    first, second = chain(2)[0], chain(1, start=100)[0]
    assert events == [
        BlockEvent(stored=tuple(first)),
        BlockEvent(removed=(first[1],)),
        BlockEvent(stored=tuple(second)),
    ]


def test_the_first_layout_stays() -> None:
    pool = HostKvPool(640, ManualClock())
    assert (pool.regions().num_blocks, counts(pool)) == (0, (0, 0, 0))
    assert pool.cached_hashes() == []
    assert not pool.check_layout(LAYOUT)
    with pytest.raises(LayoutMismatch, match="no layout yet"):
        _ = pool.layout
    pool.adopt(LAYOUT)
    pool.adopt(LAYOUT)
    assert pool.regions().num_blocks == 10
    other = a_layout(block_bytes=128, model_fingerprint="other")
    with pytest.raises(LayoutMismatch, match="model_fingerprint is 'tiny', not 'other', block_bytes is 64, not 128"):
        pool.adopt(other)
    with pytest.raises(LayoutMismatch):
        pool.check_layout(other)
    assert pool.layout == LAYOUT


def test_a_budget_below_one_block_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="budget_bytes is 63, which holds no block of 64 bytes"):
        HostKvPool(63, ManualClock(), LAYOUT)


def test_an_allocation_grows_and_is_freed_as_a_whole() -> None:
    pool, _ = make(4)
    allocation = pool.allocate(chain(1)[1], 4)
    pool.extend(allocation, 4)  # enough already
    pool.extend(allocation, 9)
    assert len(set(allocation.block_ids.tolist())) == 3
    assert counts(pool) == (3, 1, 0)
    with pytest.raises(KvExhausted, match="2 more KV blocks wanted, 1 of 4 free"):
        pool.extend(allocation, 17)
    assert len(allocation.block_ids) == 3
    pool.free(allocation)
    assert counts(pool) == (0, 4, 0)


def test_published_blocks_are_found_and_copies_stay_private() -> None:
    pool, _ = make()
    hashes, token_ids = chain(3)
    one, two = pool.allocate(token_ids, 12), pool.allocate(token_ids, 12)
    pool.publish(one, token_ids[:10])  # two full blocks
    pool.publish(two, token_ids)
    assert pool.cached_hashes() == hashes
    found = pool.get(hashes, token_ids)
    assert found.block_ids.tolist() == [*one.block_ids[:2], two.block_ids[2]]
    for allocation in (one, two, found):
        pool.free(allocation)
    assert counts(pool) == (0, 5, 3)
