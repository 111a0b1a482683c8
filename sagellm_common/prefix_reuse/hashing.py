"""Names for KV blocks: a 128-bit xxh3 chained over (parent, token ids), the same on router, workers and store."""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache

import xxhash

from sagellm_common.core.types import BlockHash, KvLayout, TokenIds


@lru_cache(maxsize=1024)  # asked several times for each request, on the way to its first token
def root_hash(layout: KvLayout, cache_salt: str = "") -> BlockHash:
    """Parent of a sequence's first block: blocks of another model, layout or tenant salt never match."""
    return xxhash.xxh3_128_digest(repr((astuple(layout), cache_salt)).encode())


def block_hashes(token_ids: TokenIds, block_size_tokens: int, root: BlockHash) -> list[BlockHash]:
    """One hash per full block of `token_ids`, in order."""
    packed = token_ids.astype("<i4", copy=False).tobytes()
    step = 4 * block_size_tokens
    digest = xxhash.xxh3_128_digest
    parent, hashes = root, []
    for start in range(0, len(packed) - step + 1, step):
        parent = digest(parent + packed[start : start + step])
        hashes.append(parent)
    return hashes
