"""The prefix cache, as LMDeploy's sequences use it, under any policy: what is in use stays, what is not can be had."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy.kv_manager import EnginePrefixCache, SequencePrefix
from sagellm_common.kv_policy.eviction import EVICTION, swap_eviction
from sagellm_common.kv_runtime.block_manager import BlockArray, BlockManager

NUM_BLOCKS = 8
# One token per block out of two: prefixes of each other are common.
SEQUENCES = st.lists(st.integers(0, 1), min_size=2, max_size=6)


class Cache(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS)
        self.cache = EnginePrefixCache(self.blocks, 1)
        self.told: set[bytes] = set()
        self.cache.watchers.append(self.follow)
        self.running: dict[int, tuple[list[int], BlockArray]] = {}
        self.started = 0

    def follow(self, event: BlockEvent) -> None:
        self.told = self.told - set(event.removed) | set(event.stored)

    def idle(self) -> int:
        """Cached blocks that nobody else holds."""
        return int(np.count_nonzero(self.blocks.ref_counts[self.cache.blocks()] == 1))

    @rule(tokens=SEQUENCES)
    def start(self, tokens: list[int]) -> None:
        hashes, found = self.cache.lookup(as_token_ids(tokens), b"root")
        missing = len(tokens) - len(found)
        short = missing - self.blocks.num_free
        if short > self.idle():
            self.cache.release(found, used=False)
            return
        if short > 0:
            assert self.cache.evict(short) == short
        self.started += 1
        self.running[self.started] = tokens, np.concatenate([found, self.blocks.allocate(missing)])
        self.cache.prefixes[self.started] = SequencePrefix(b"root", hashes)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["finished", "failed", "copied"]))
    def end(self, data: st.DataObject, how: str) -> None:
        session = data.draw(st.sampled_from(sorted(self.running)))
        tokens, blocks = self.running.pop(session)
        if how != "failed":
            self.cache.publish(self.cache.prefixes[session], as_token_ids(tokens), blocks, len(tokens))
        del self.cache.prefixes[session]
        self.cache.release(blocks, used=how != "copied")

    @precondition(lambda self: self.running)
    @rule(data=st.data(), computed=st.integers(1, 6))
    def publish(self, data: st.DataObject, computed: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.running)))
        tokens, blocks = self.running[session]
        self.cache.publish(self.cache.prefixes[session], as_token_ids(tokens), blocks, min(computed, len(tokens)))

    @rule(count=st.integers(1, NUM_BLOCKS))
    def evict(self, count: int) -> None:
        idle, free = self.idle(), self.blocks.num_free
        assert self.cache.evict(count) == min(count, idle)
        assert self.blocks.num_free == free + min(count, idle)

    @rule(name=st.sampled_from(sorted(EVICTION)))
    def set_eviction(self, name: str) -> None:
        self.cache.policy = swap_eviction(self.cache.policy, name, NUM_BLOCKS)

    @invariant()
    def every_reference_is_accounted_for(self) -> None:
        expected = np.zeros(NUM_BLOCKS, int)
        for blocks in (self.cache.blocks(), *(blocks for _, blocks in self.running.values())):
            expected[blocks] += 1
        assert self.blocks.ref_counts.tolist() == expected.tolist()
        assert self.blocks.problems() == []
        assert set(self.cache.hashes()) == self.told
        assert len(self.cache.blocks()) == len(self.told)


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
