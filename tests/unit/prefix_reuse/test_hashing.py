"""Block hashes: one name per (layout, salt, tokens), and another for anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sagellm_common.core.types import KvLayout, as_token_ids
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash

LAYOUT = KvLayout("model", "float32", 16, num_layers=2, num_kv_heads=2, head_dim=16, block_bytes=8192)
OTHER = {
    "model_fingerprint": "another",
    "dtype": "bfloat16",
    "block_size_tokens": 32,
    "num_layers": 3,
    "num_kv_heads": 4,
    "head_dim": 8,
    "block_bytes": 4096,
    "tp": 2,  # as many bytes, in another order
    "pp": 2,
}


@pytest.mark.parametrize("field", OTHER)
def test_blocks_of_another_layout_have_other_names(field: str) -> None:
    assert root_hash(LAYOUT) != root_hash(replace(LAYOUT, **{field: OTHER[field]}))


def test_blocks_of_another_salt_have_other_names() -> None:
    assert len({root_hash(LAYOUT), root_hash(LAYOUT, "a"), root_hash(LAYOUT, "b")}) == 3


def test_a_hash_names_its_whole_prefix() -> None:
    root, tokens = root_hash(LAYOUT), as_token_ids(list(range(40)))
    hashes = block_hashes(tokens, 16, root)
    assert len(hashes) == 2  # the last 8 tokens fill no block
    changed = tokens.copy()
    changed[0] += 1
    assert not set(hashes) & set(block_hashes(changed, 16, root))
    assert block_hashes(tokens[16:], 16, hashes[0]) == hashes[1:]
