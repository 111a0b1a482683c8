"""Names for KV blocks: a 128-bit xxh3 chained over (parent, token ids), the same on router, workers and store.

Compiled where `make setup` found a compiler, else in Python; the values are the same.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache

import numpy as np
import xxhash

from sagellm_common.core.types import BLOCK_HASH_BYTES, BlockHash, KvLayout, TokenIds
from sagellm_common.prefix_reuse import native


@lru_cache(maxsize=1024)  # asked several times for each request, on the way to its first token
def root_hash(layout: KvLayout, cache_salt: str = "") -> BlockHash:
    """Parent of a sequence's first block: blocks of another model, layout or tenant salt never match."""
    return xxhash.xxh3_128_digest(repr((astuple(layout), cache_salt)).encode())


def block_hashes(token_ids: TokenIds, block_size_tokens: int, root: BlockHash) -> list[BlockHash]:
    """One hash per full block of `token_ids`, in order."""
    return unpack_hashes(packed_block_hashes(token_ids, block_size_tokens, root))


def packed_block_hashes(token_ids: TokenIds, block_size_tokens: int, root: BlockHash) -> bytes:
    """The same, one after the other: how many hashes travel, and how the index takes them."""
    tokens = np.ascontiguousarray(token_ids, dtype="<i4")
    library = native.library()
    if library is None or len(root) != BLOCK_HASH_BYTES:  # the chain may begin with any bytes
        return chained(tokens, block_size_tokens, root)
    count, block_bytes = len(tokens) // block_size_tokens, 4 * block_size_tokens
    hashes = np.empty((count, BLOCK_HASH_BYTES), np.uint8)
    scratch = np.empty(BLOCK_HASH_BYTES + block_bytes, np.uint8)
    library.sage_chain(root, tokens.ctypes.data, block_bytes, count, scratch.ctypes.data, hashes.ctypes.data)
    return hashes.tobytes()


def chained(token_ids: TokenIds, block_size_tokens: int, root: BlockHash) -> bytes:
    """`packed_block_hashes` in Python."""
    packed = token_ids.astype("<i4", copy=False).tobytes()
    step = 4 * block_size_tokens
    digest = xxhash.xxh3_128_digest
    parent, hashes = root, []
    for start in range(0, len(packed) - step + 1, step):
        parent = digest(parent + packed[start : start + step])
        hashes.append(parent)
    return b"".join(hashes)


def unpack_hashes(packed: bytes) -> list[BlockHash]:
    """Hashes that lie one after the other, each by itself."""
    return [packed[i : i + BLOCK_HASH_BYTES] for i in range(0, len(packed), BLOCK_HASH_BYTES)]
