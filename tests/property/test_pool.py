"""The pool, its cache and its quotas against what each holder believes: its bytes are its own, wherever they are moved,
whoever shares them, and nobody gets more, or less, than its share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import KvExhausted, Overloaded, TenantQuota
from sagellm_common.core.kv import BlockEvent, BlockMoves
from sagellm_common.core.types import BlockHash, TokenIds
from sagellm_common.kv_policy.eviction import EVICTION
from sagellm_common.kv_runtime.backends.mock import MockKvPool
from sagellm_common.kv_runtime.integrity import check
from sagellm_common.kv_runtime.pool import PoolAllocation
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.kv_channels import a_layout

NUM_BLOCKS, BLOCK_BYTES, SIZE = 10, 16, 2
LAYOUT = a_layout(BLOCK_BYTES, SIZE)
TENANTS = {"gold": TenantConfig(guaranteed=0.4), "small": TenantConfig(guaranteed=0.1, limit=0.3)}
GUARANTEED, LIMIT = {"default": 0, "gold": 4, "small": 1}, {"default": 10, "gold": 10, "small": 3}
TENANT = st.sampled_from(sorted(LIMIT))
# A token of two: prefixes of each other are common.
PROMPTS = st.lists(st.integers(0, 1), max_size=9).map(lambda ids: np.array(ids, np.int32))


@dataclass(slots=True, eq=False)
class Holder:
    allocation: PoolAllocation
    prompt: TokenIds
    tenant: str
    contents: list[bytes]


class Pool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.pool = MockKvPool(LAYOUT, NUM_BLOCKS, tenants=TENANTS, clock=self.clock)
        self.pool.watch(self.follow)
        self.cached: dict[BlockHash, bytes] = {}
        """What each cached block holds."""
        self.holders: list[Holder] = []
        self.writes = 0

    def follow(self, event: BlockEvent) -> None:
        for key in event.removed:
            del self.cached[key]
        for key in event.stored:
            self.cached[key] = b""

    def bytes_at(self, block_id: int) -> bytes:
        return self.pool.regions().block(block_id).tobytes()

    def write(self, holder: Holder, first: int) -> None:
        """Something new from block `first` on."""
        for position in range(first, len(holder.allocation.block_ids)):
            self.writes += 1
            holder.contents[position] = self.writes.to_bytes(BLOCK_BYTES, "little")
            self.pool.regions().block(int(holder.allocation.block_ids[position]))[:] = holder.contents[position]

    def held_blocks(self) -> set[int]:
        return {block for holder in self.holders for block in holder.allocation.table.tolist()}

    def check_refusal(self, error: Overloaded, count: int, tenant: str) -> None:
        """It is right to turn the tenant away: its limit, or no block is idle; and its guarantee was kept."""
        charged = {usage.tenant: usage.charged_blocks for usage in self.pool.tenant_usage()}
        idle = NUM_BLOCKS - len(self.held_blocks())
        if isinstance(error, TenantQuota):
            assert charged[tenant] + count > GUARANTEED[tenant], "refused within its guarantee"
        else:
            assert isinstance(error, KvExhausted)
            assert count > idle, "there was room"

    @rule(prompt=PROMPTS, more=st.integers(0, 6), tenant=TENANT)
    def allocate(self, prompt: TokenIds, more: int, tenant: str) -> None:
        hashes = block_hashes(prompt[: max(0, len(prompt) - 1) // SIZE * SIZE], SIZE, root_hash(LAYOUT))
        leading = next((n for n, key in enumerate(hashes) if key not in self.cached), len(hashes))
        shared = [self.cached[key] for key in hashes[:leading]]
        busy, before = self.held_blocks(), self.pool.cached_hashes()
        try:
            allocation = self.pool.allocate(prompt, len(prompt) + more, tenant=tenant)
        except Overloaded as error:
            self.check_refusal(error, -(-(len(prompt) + more) // SIZE) - leading, tenant)
            assert self.pool.cached_hashes() == before, "what was refused took something"
            return
        assert (allocation.num_shared_blocks, allocation.num_cached_tokens) == (leading, leading * SIZE)
        assert busy.isdisjoint(allocation.table[leading:].tolist())
        holder = Holder(allocation, prompt, tenant, shared + [b""] * (len(allocation.table) - leading))
        self.holders.append(holder)
        self.write(holder, leading)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        shared = self.pool.share(holder.allocation)
        self.holders.append(Holder(shared, holder.prompt, holder.tenant, list(holder.contents)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.publish(holder.allocation, holder.prompt)
        for block, contents in zip(holder.allocation.table.tolist(), holder.contents, strict=True):
            key = self.pool.cache.hash_of(block)
            if key is not None and not self.cached[key]:
                self.cached[key] = contents

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), begin=st.integers(0, 12))
    def go_on_from(self, data: st.DataObject, begin: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        try:
            self.pool.make_writable(holder.allocation, begin)
        except Overloaded:
            return
        self.everybody_finds_what_it_has_written()  # in its copies, too
        self.write(holder, begin // SIZE)
        # What is written is no KV of the prompt: it is not to be published under its hash.
        holder.prompt = holder.prompt[: min(len(holder.prompt), begin // SIZE * SIZE)]

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), num_tokens=st.integers(0, 16))
    def extend(self, data: st.DataObject, num_tokens: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        before = len(holder.allocation.table)
        try:
            self.pool.extend(holder.allocation, num_tokens)
        except Overloaded as error:
            self.check_refusal(error, -(-num_tokens // SIZE) - before, holder.tenant)
            return
        holder.contents += [b""] * (len(holder.allocation.table) - before)
        self.write(holder, before)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(holder.allocation)
        self.pool.free(holder.allocation)

    @rule(data=st.data())
    def migrate(self, data: st.DataObject) -> None:
        """Whatever is asked for, also what must not move and where nothing may go."""
        order = data.draw(st.permutations(range(NUM_BLOCKS)))
        count = data.draw(st.integers(0, NUM_BLOCKS // 2))
        sources, targets = np.array(order[:count], np.int32), np.array(order[count : 2 * count], np.int32)
        self.pool.migrate(BlockMoves(sources, targets))

    @rule(max_blocks=st.integers(0, NUM_BLOCKS))
    def defragment(self, max_blocks: int) -> None:
        before = self.pool.get_fragmentation().longest_free_run_blocks
        assert self.pool.defragment(max_blocks * BLOCK_BYTES) <= max_blocks
        assert self.pool.get_fragmentation().longest_free_run_blocks >= before

    @rule(seconds=st.sampled_from([0.1, 5.0]), eviction=st.sampled_from(sorted(EVICTION)))
    def time_passes(self, seconds: float, eviction: str) -> None:
        self.clock.advance(seconds)
        self.pool.set_eviction(eviction)

    @invariant()
    def everybody_finds_what_it_has_written(self) -> None:
        for holder in self.holders:
            assert holder.allocation.block_ids.tolist() == self.pool.blocks.slots(holder.allocation.table).tolist()
            assert [self.bytes_at(block) for block in holder.allocation.block_ids.tolist()] == holder.contents
        for key, contents in self.cached.items():
            slot = int(self.pool.blocks.slots(self.pool.cache.blocks_of([key]))[0])
            assert self.bytes_at(slot) == contents

    @invariant()
    def the_books_are_right(self) -> None:
        assert check(self.pool, self.pool.cached_hashes()).problems == ()
        assert set(self.pool.cached_hashes()) == set(self.cached)
        assert self.pool.get_utilization().used_blocks == len(self.held_blocks())
        usage = self.pool.tenant_usage()
        assert sum(tenant.charged_blocks for tenant in usage) == NUM_BLOCKS - self.pool.blocks.num_free
        assert all(tenant.charged_blocks <= LIMIT[tenant.tenant] for tenant in usage)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
