"""Blocks of tokens 0, 1, 2, … for tiers, each with bytes that tell it from the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockHash, TokenIds
from sagellm_common.kv_runtime.backends.file import FileTier
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.file_slots import PAGE_BYTES
from sagellm_common.kv_runtime.tiers import BlockKey, TierBackend, keys_of
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.kv_channels import a_layout

BLOCK_BYTES, BLOCK_TOKENS = 64, 4
LAYOUT = a_layout(BLOCK_BYTES, BLOCK_TOKENS)
RECORD_BYTES = 128
SLOT_BYTES = PAGE_BYTES + RECORD_BYTES
"""What a block of LAYOUT takes of a file tier's budget."""


def chain(num_blocks: int, first_token: int = 0) -> tuple[list[BlockHash], TokenIds]:
    token_ids = np.arange(first_token, first_token + BLOCK_TOKENS * num_blocks, dtype=np.int32)
    return block_hashes(token_ids, BLOCK_TOKENS, root_hash(LAYOUT)), token_ids


def keys(num_blocks: int, first_token: int = 0) -> list[BlockKey]:
    return keys_of(*chain(num_blocks, first_token), BLOCK_TOKENS)


def content(block_hash: BlockHash) -> bytes:
    return block_hash * (BLOCK_BYTES // len(block_hash))


def region_of(wanted: Sequence[BlockKey]) -> KvRegion:
    data = bytearray(b"".join(content(key.hash) for key in wanted))
    return KvRegion(memoryview(data), BLOCK_BYTES, len(wanted))


def write(tier: TierBackend, wanted: Sequence[BlockKey]) -> int:
    return tier.write(wanted, region_of(wanted), np.arange(len(wanted), dtype=np.int32))


def read(tier: TierBackend, wanted: Sequence[BlockKey]) -> int:
    """How many were read; those are what was written."""
    region = KvRegion(memoryview(bytearray(BLOCK_BYTES * len(wanted))), BLOCK_BYTES, len(wanted))
    count = tier.read(wanted, region, np.arange(len(wanted), dtype=np.int32))
    assert [bytes(region.block(n)) for n in range(count)] == [content(key.hash) for key in wanted[:count]]
    return count


def file_tier(path: Path, num_blocks: int = 8) -> tuple[FileTier, TierDirectory]:
    directory = TierDirectory(path, num_blocks * SLOT_BYTES)
    return directory.open(LAYOUT), directory
