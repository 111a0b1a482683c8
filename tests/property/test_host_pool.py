"""The host pool against a dictionary: what is stored is found, bytes and all, and every block is accounted for."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import KvExhausted
from sagellm_common.core.kv import Allocation, BlockEvent
from sagellm_common.core.types import BlockHash, TokenIds
from sagellm_common.kv_policy.eviction import EVICTION
from sagellm_common.kv_runtime.backends.host import HostKvPool, PendingPut
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.kv_channels import a_layout

NUM_BLOCKS = 6
LAYOUT = a_layout(block_bytes=16, block_size_tokens=1)
# One token per block out of two: prefixes of each other are common.
SEQUENCES = st.lists(st.integers(0, 1), max_size=5).map(lambda ids: np.array(ids, dtype=np.int32))


class HostPool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.pool = HostKvPool(NUM_BLOCKS * 16, self.clock, LAYOUT, eviction="cost-aware")
        self.seen: set[BlockHash] = set()
        self.pool.watch(self.follow)
        self.puts: list[PendingPut] = []
        self.held: list[tuple[Allocation, list[BlockHash]]] = []

    def follow(self, event: BlockEvent) -> None:
        in_use = {block_hash for _, hashes in self.held for block_hash in hashes}
        assert in_use.isdisjoint(event.removed), "evicted what is held"
        assert self.seen >= set(event.removed)
        self.seen = self.seen - set(event.removed) | set(event.stored)

    def hashes(self, token_ids: TokenIds) -> list[BlockHash]:
        return block_hashes(token_ids, 1, root_hash(LAYOUT))

    def busy(self) -> list[int]:
        """Blocks that belong to somebody."""
        return [b for put in self.puts for b in put.allocation.block_ids.tolist()] + [
            b for allocation, _ in self.held for b in allocation.block_ids.tolist()
        ]

    @rule(token_ids=SEQUENCES)
    def begin_put(self, token_ids: TokenIds) -> None:
        busy = self.busy()
        put = self.pool.begin_put(self.hashes(token_ids), token_ids)
        assert set(put.allocation.block_ids.tolist()).isdisjoint(busy)
        for block_hash, block_id in zip(put.hashes, put.allocation.block_ids.tolist(), strict=True):
            assert block_hash not in self.seen
            self.pool.regions().block(block_id)[:] = block_hash
        self.puts.append(put)

    @precondition(lambda self: self.puts)
    @rule(data=st.data(), commit=st.booleans())
    def end_put(self, data: st.DataObject, commit: bool) -> None:
        put = self.puts.pop(data.draw(st.integers(0, len(self.puts) - 1)))
        if commit:
            self.pool.commit_put(put)
            assert self.seen.issuperset(put.hashes)
        else:
            self.pool.abort_put(put)
            assert self.seen.isdisjoint(put.hashes)

    @rule(token_ids=SEQUENCES)
    def get(self, token_ids: TokenIds) -> None:
        hashes = self.hashes(token_ids)
        leading = next((n for n, block_hash in enumerate(hashes) if block_hash not in self.seen), len(hashes))
        assert self.pool.lookup(hashes) == leading
        allocation = self.pool.get(hashes, token_ids)
        assert len(allocation.block_ids) == leading
        self.held.append((allocation, hashes[:leading]))

    @rule(token_ids=SEQUENCES, more=st.integers(0, 3))
    def allocate(self, token_ids: TokenIds, more: int) -> None:
        usable = self.hashes(token_ids[:-1])
        leading = next((n for n, block_hash in enumerate(usable) if block_hash not in self.seen), len(usable))
        before = self.pool.get_utilization()
        try:
            allocation = self.pool.allocate(token_ids, len(token_ids) + more)
        except KvExhausted:
            # Hits that nobody held count as cached before, but are not there to be evicted.
            assert len(token_ids) + more > before.free_blocks + before.cached_blocks
            assert self.pool.get_utilization() == before
            return
        assert allocation.num_shared_blocks == leading
        assert len(allocation.block_ids) == len(token_ids) + more
        self.held.append((allocation, usable[:leading]))
        for block_id in allocation.block_ids.tolist()[leading:]:
            self.pool.regions().block(block_id)[:] = b"somebody's own.."

    @precondition(lambda self: self.held)
    @rule(data=st.data(), twice=st.booleans())
    def free(self, data: st.DataObject, twice: bool) -> None:
        allocation, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(allocation)
        if twice:
            self.pool.free(allocation)

    @rule(token_ids=SEQUENCES, ttl_s=st.integers(0, 3))
    def pin(self, token_ids: TokenIds, ttl_s: int) -> None:
        hashes = self.hashes(token_ids)
        pinned = self.pool.pin(hashes, ttl_s)
        assert pinned == (len(self.seen.intersection(hashes)) if ttl_s else 0)

    @rule(name=st.sampled_from(sorted(EVICTION)))
    def set_eviction(self, name: str) -> None:
        self.pool.set_eviction(name)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        stats = self.pool.get_utilization()
        assert stats.balanced, stats
        assert stats.used_blocks >= len(set(self.busy()))
        assert stats.cached_blocks + stats.used_blocks >= len(self.seen)
        assert set(self.pool.cached_hashes()) == self.seen

    @invariant()
    def held_blocks_keep_their_bytes(self) -> None:
        region = self.pool.regions()
        for allocation, hashes in self.held:
            for block_id, block_hash in zip(allocation.block_ids.tolist(), hashes, strict=False):
                assert region.block(block_id).tobytes() == block_hash

    def teardown(self) -> None:
        for put in self.puts:
            self.pool.abort_put(put)
        for allocation, _ in self.held:
            self.pool.free(allocation)
        self.held.clear()
        self.clock.advance(100)
        stats = self.pool.get_utilization()
        assert stats.balanced and stats.used_blocks == 0
        allocation = self.pool.allocate(np.zeros(0, np.int32), NUM_BLOCKS)
        assert not self.seen, "what nobody uses can be had"
        self.pool.free(allocation)


TestHostPool = HostPool.TestCase
TestHostPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
