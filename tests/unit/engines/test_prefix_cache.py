"""PrefixCache over LMDeploy's allocator, without an engine."""

from __future__ import annotations

import numpy as np

from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy.kv_manager import PrefixCache, SequencePrefix

ROOT = b"root"


def test_a_parent_evicted_under_a_running_sequence_leaves_nothing_that_cannot_be_evicted() -> None:
    from lmdeploy.pytorch.paging.block_manager.base_block_manager import LogicalAllocator

    allocator = LogicalAllocator(0, 8)
    cache = PrefixCache(allocator, block_size_tokens=4, num_blocks=8)
    tokens = as_token_ids(list(range(8)))
    first, second, third = (SequencePrefix(ROOT) for _ in range(3))
    one, two, three = allocator.allocate(1), allocator.allocate(2), allocator.allocate(2)

    cache.publish(first, tokens, one, 4)
    cache.publish(second, tokens, two, 4)  # computed twice: private
    allocator.free(one)
    assert cache.evict(1) == 1
    cache.publish(second, tokens, two, 8)  # its parent is gone from the cache
    cache.publish(third, tokens, three, 8)
    for blocks in (two, three):
        allocator.free(blocks)

    hashes, found = cache.lookup(as_token_ids(list(range(9))), ROOT)
    assert len(hashes) == 2
    allocator.free(found)
    for _ in range(2):  # one by one, as a pool under pressure does
        cache.evict(1)
    assert cache.hashes() == []
    assert allocator.get_num_free_blocks() == 8
    assert not np.count_nonzero(allocator.get_ref_count(np.arange(8)))
