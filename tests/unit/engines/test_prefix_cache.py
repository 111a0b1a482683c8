"""EnginePrefixCache over a BlockManager, without an engine."""

from __future__ import annotations

from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy.kv_manager import EnginePrefixCache, SequencePrefix
from sagellm_common.kv_runtime.block_manager import BlockManager

ROOT = b"root"


def test_a_parent_evicted_under_a_running_sequence_leaves_nothing_that_cannot_be_evicted() -> None:
    blocks = BlockManager(8)
    cache = EnginePrefixCache(blocks, block_size_tokens=4)
    tokens = as_token_ids(list(range(8)))
    first, second, third = (SequencePrefix(ROOT) for _ in range(3))
    one, two, three = blocks.allocate(1), blocks.allocate(2), blocks.allocate(2)

    cache.publish(first, tokens, one, 4)
    cache.publish(second, tokens, two, 4)  # computed twice: private
    cache.release(one)
    assert cache.evict(1) == 1
    cache.publish(second, tokens, two, 8)  # its parent is gone from the cache
    assert cache.hashes() == []
    cache.publish(third, tokens, three, 8)
    for table in (two, three):
        cache.release(table)

    hashes, found = cache.lookup(as_token_ids(list(range(9))), ROOT)
    assert len(hashes) == 2
    cache.release(found)
    for _ in range(2):  # one by one, as a pool under pressure does
        cache.evict(1)
    assert cache.hashes() == []
    assert blocks.num_free == 8
    assert not blocks.ref_counts.any()
