"""What a pool gives up and what comes back to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import Allocation, BlockEvent, KvRegion, Tier
from sagellm_common.core.types import BlockHash, KvOrigins, TokenIds
from sagellm_common.kv_runtime import host_cache
from sagellm_common.kv_runtime.host_cache import HostCache
from sagellm_common.kv_runtime.pool import KVPool
from sagellm_common.kv_runtime.tiers import keys_of
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.matcher import contexts
from tests.support.kv_tiers import BLOCK_BYTES, BLOCK_TOKENS, LAYOUT, chain, content

NUM_BLOCKS = 6


class Pool:
    """A device's pool of NUM_BLOCKS, and host memory below it."""

    def __init__(self, host_blocks: int) -> None:
        self.memory = KvRegion(memoryview(bytearray(NUM_BLOCKS * BLOCK_BYTES)), BLOCK_BYTES, NUM_BLOCKS)
        self.pool = KVPool()
        self.pool.open(LAYOUT, self.memory)
        self.pool.keep_below(HostCache(host_blocks * BLOCK_BYTES, LAYOUT, ManualClock()))

    def allocate(self, token_ids: TokenIds, salt: str = "") -> Allocation:
        return self.pool.allocate(token_ids, len(token_ids), salt)

    def compute(self, num_blocks: int, first_token: int = 0) -> int:
        """Of a prompt of these blocks and one token more; returns how many tokens were there already, byte for byte."""
        hashes, token_ids = chain(num_blocks, first_token)
        allocation = self.allocate(np.append(token_ids, 7).astype(np.int32))
        cached = allocation.num_cached_tokens // BLOCK_TOKENS
        for n, block_id in enumerate(allocation.block_ids.tolist()[:num_blocks]):
            if n < cached:
                assert bytes(self.memory.block(block_id)) == content(hashes[n])
            self.memory.block(block_id)[:] = content(hashes[n])
        with self.pool.lock:
            table = allocation.table[:num_blocks]  # type: ignore[attr-defined]
            self.pool.cache.insert(keys_of(hashes, token_ids, BLOCK_TOKENS), table)
        self.pool.free(allocation)
        return allocation.num_cached_tokens


def test_what_was_evicted_comes_back() -> None:
    pool = Pool(host_blocks=16)
    assert pool.compute(5) == 0
    assert pool.compute(5, 100) == 0  # takes the place of the first
    assert pool.compute(5) == 20
    assert pool.compute(5, 100) == 20
    (host,) = pool.pool.get_utilization().tiers
    assert (host.name, host.used_blocks, host.torn_blocks) == ("host", 10, 0)
    assert host.hit_blocks > 0
    assert pool.pool.get_utilization().balanced


def test_what_the_pool_has_still_is_shared_and_the_rest_brought_back() -> None:
    pool = Pool(host_blocks=16)
    pool.compute(5)
    pool.compute(3, 100)
    allocation = pool.allocate(np.append(chain(5)[1], 7).astype(np.int32))
    assert 0 < allocation.num_shared_blocks < 5
    assert allocation.num_cached_tokens == 20
    assert allocation.origins == KvOrigins(host_tokens=20 - 4 * allocation.num_shared_blocks)
    pool.pool.free(allocation)


def test_the_host_forgets_what_it_has_no_room_for() -> None:
    pool = Pool(host_blocks=2)
    pool.compute(5)
    pool.compute(5, 100)
    assert pool.compute(5) < 20
    (host,) = pool.pool.get_utilization().tiers
    assert (host.total_blocks, host.used_blocks) == (2, 2)


def test_another_salt_finds_nothing() -> None:
    pool = Pool(host_blocks=16)
    pool.compute(5)
    pool.compute(5, 100)
    allocation = pool.allocate(np.append(chain(5)[1], 7).astype(np.int32), "somebody else's")
    assert allocation.num_cached_tokens == 0


def test_one_token_is_left_to_compute() -> None:
    pool = Pool(host_blocks=16)
    pool.compute(4)
    pool.compute(5, 100)
    assert pool.allocate(chain(4)[1]).num_cached_tokens == 12


def test_so_much_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cache, "MAX_COPY_BYTES", 2 * BLOCK_BYTES)
    pool = Pool(host_blocks=16)
    pool.compute(5)
    pool.compute(5, 100)
    hashes, token_ids = chain(5)
    asked = np.append(token_ids, 7).astype(np.int32)
    allocation = pool.allocate(asked)
    gained = [allocation.num_cached_tokens]
    while allocation.more_below:
        gained.append(pool.pool.bring_back(allocation, asked))
    assert gained == [8, 8, 4]
    assert (allocation.num_cached_tokens, allocation.origins.host_tokens) == (20, 20)
    assert [bytes(pool.memory.block(block)) for block in allocation.block_ids.tolist()[:5]] == [*map(content, hashes)]
    assert pool.pool.bring_back(allocation, asked) == 0
    pool.pool.free(allocation)
    with pytest.raises(ValueError, match="freed"):
        pool.pool.bring_back(allocation, asked)


def test_blocks_that_are_freed_while_they_are_filled_are_nobody_elses_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_cache, "MAX_COPY_BYTES", 2 * BLOCK_BYTES)
    pool, copy = Pool(host_blocks=16), host_cache.copy_blocks
    pool.compute(5)
    pool.compute(5, 100)
    asked = np.append(chain(5)[1], 7).astype(np.int32)
    allocation = pool.allocate(asked)
    free = []

    def given_up(*args: Any) -> None:
        pool.pool.free(allocation)
        free.append(pool.pool.get_utilization().free_blocks)
        copy(*args)

    monkeypatch.setattr(host_cache, "copy_blocks", given_up)
    pool.pool.bring_back(allocation, asked)
    assert free == [0] and pool.pool.get_utilization().used_blocks == 0


def test_watchers_hear_of_both_tiers() -> None:
    """What they have heard is what there is, and a block that goes down is never nowhere."""
    pool = Pool(host_blocks=7)
    held: dict[Tier, set[BlockHash]] = {Tier.DEVICE: set(), Tier.HOST: set()}

    def follow(event: BlockEvent) -> None:
        tier = held[event.tier or Tier.DEVICE]
        tier.update(event.stored)
        if event.tier is None:
            assert all(block in held[Tier.HOST] for block in event.removed)
        tier.difference_update(event.removed)

    pool.pool.watch(follow)
    for first_token in (0, 100, 0, 200, 100):
        pool.compute(5, first_token)
        assert held == {tier: set(hashes) for tier, hashes in pool.pool.cached_by_tier().items()}
    assert len(held[Tier.HOST]) == 7


def test_a_copy_that_fails_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(host_blocks=16)
    pool.compute(5)
    pool.compute(5, 100)

    def fail(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(host_cache, "copy_blocks", fail)
    with pytest.raises(ValueError, match="broken"):
        pool.allocate(np.append(chain(5)[1], 7).astype(np.int32))
    stats = pool.pool.get_utilization()
    assert stats.balanced and stats.used_blocks == 0


def test_a_budget_below_one_block() -> None:
    with pytest.raises(ConfigError, match=r"kv\.host_budget_bytes is 10, which holds no block of 64 bytes"):
        HostCache(10, LAYOUT, ManualClock())


def test_tokens_are_compared() -> None:
    """A hash is no proof: the host's copy is of other tokens."""
    cache = HostCache(4 * BLOCK_BYTES, LAYOUT, ManualClock())
    memory = KvRegion(memoryview(bytearray(2 * BLOCK_BYTES)), BLOCK_BYTES, 2)
    token_ids = np.arange(BLOCK_TOKENS, dtype=np.int32)
    hashes = block_hashes(token_ids, BLOCK_TOKENS, root_hash(LAYOUT))
    cache.keep(keys_of(hashes, token_ids + 1, BLOCK_TOKENS), memory, np.array([0], dtype=np.int32))
    assert cache.bring_back(hashes, token_ids, [b""], memory, np.array([1], dtype=np.int32)) == 0


def test_what_comes_before_is_compared() -> None:
    """Two blocks of one name and the same tokens, after different ones: the copy of one is not the other."""
    cache = HostCache(4 * BLOCK_BYTES, LAYOUT, ManualClock())
    memory = KvRegion(memoryview(bytearray(2 * BLOCK_BYTES)), BLOCK_BYTES, 2)
    hashes, token_ids = chain(1)
    cache.keep(keys_of(hashes, token_ids, BLOCK_TOKENS, before=b"one"), memory, np.array([0], dtype=np.int32))
    slots = np.array([1], dtype=np.int32)
    for before, expected in ((b"another", 0), (b"one", 1)):
        known = list(contexts(before, token_ids.tobytes(), 4 * BLOCK_TOKENS))
        assert cache.bring_back(hashes, token_ids, known, memory, slots) == expected
    assert cache.rejected == 1
