"""EnginePrefixCache over a BlockManager, without an engine."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from sagellm_common.core.types import BlockHash, TokenIds, as_token_ids
from sagellm_common.engines.lmdeploy.kv_manager import EnginePrefixCache, SequencePrefix
from sagellm_common.kv_runtime.block_manager import BlockManager
from sagellm_common.prefix_reuse import hashing

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


def test_blocks_of_one_name_are_told_apart_by_all_that_comes_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are published block by block, as they are generated; four names for all blocks there are."""

    def weak(token_ids: TokenIds, block_size_tokens: int, root: BlockHash) -> bytes:
        names, parent = b"", root
        for start in range(0, len(token_ids) - block_size_tokens + 1, block_size_tokens):
            block = token_ids[start : start + block_size_tokens].tobytes()
            parent = bytes([xxhash.xxh3_64_digest(parent + block)[0] % 4]) * 16
            names += parent
        return names

    monkeypatch.setattr(hashing, "packed_block_hashes", weak)
    rng, computed_for = random.Random(2), dict[int, list[int]]()
    blocks = BlockManager(64)
    cache = EnginePrefixCache(blocks, block_size_tokens=2)
    reused = 0
    for _ in range(200):
        tokens = [rng.randrange(2) for _ in range(9)]
        hashes, found = cache.lookup(as_token_ids(tokens), ROOT)
        for n, block in enumerate(found.tolist()):
            assert computed_for[block] == tokens[: 2 * (n + 1)]
        reused += len(found)
        prefix = SequencePrefix(ROOT)
        cache.begin(prefix, hashes)
        table = np.concatenate([found, blocks.allocate(4 - len(found))])
        computed_for |= {int(table[n]): tokens[: 2 * (n + 1)] for n in range(len(found), 4)}
        for num_computed in range(2 * len(found), 9):
            cache.publish(prefix, as_token_ids(tokens), table, num_computed)
        cache.release(table)
        cache.evict(rng.randrange(3))
    assert reused > 0
    assert cache.matcher.rejected > 0
