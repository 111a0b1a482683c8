"""Block hashes: one name per (layout, salt, tokens), and another for anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xxhash

from sagellm_common.core.types import KvLayout, as_token_ids
from sagellm_common.prefix_reuse import native
from sagellm_common.prefix_reuse.hashing import block_hashes, chained, packed_block_hashes, root_hash

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


@pytest.mark.parametrize("block_size_tokens", [1, 4, 16, 20, 28, 29, 32, 52, 56, 57, 64, 256, 300])
def test_compiled_hashes_are_those_of_the_library(block_size_tokens: int) -> None:
    if native.library() is None:
        pytest.skip("needs the compiled hashes: python -m sagellm_common.prefix_reuse.native")
    tokens, root = as_token_ids([(7919 * n) % 50_000 for n in range(5 * block_size_tokens + 3)]), root_hash(LAYOUT)
    packed = packed_block_hashes(tokens, block_size_tokens, root)
    assert packed == chained(tokens, block_size_tokens, root)
    parent = root
    for n in range(5):
        block = tokens[n * block_size_tokens : (n + 1) * block_size_tokens].tobytes()
        parent = xxhash.xxh3_128_digest(parent + block)
        assert packed[16 * n : 16 * n + 16] == parent


def test_without_the_compiled_hashes_the_names_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, root = as_token_ids(list(range(100))), root_hash(LAYOUT)
    expected = block_hashes(tokens, 16, root)
    monkeypatch.setattr(native, "library", lambda: None)
    assert block_hashes(tokens, 16, root) == expected
    assert b"".join(expected) == packed_block_hashes(tokens[::1], 16, root)


def test_tokens_need_not_lie_in_a_row() -> None:
    tokens, root = as_token_ids(list(range(100))), root_hash(LAYOUT)
    every_other = tokens[::2]
    assert packed_block_hashes(every_other, 16, root) == packed_block_hashes(every_other.copy(), 16, root)
    assert packed_block_hashes(every_other.astype("int64"), 16, root) == packed_block_hashes(every_other, 16, root)
    assert packed_block_hashes(tokens[:15], 16, root) == b""


def test_a_chain_may_begin_with_anything() -> None:
    tokens = as_token_ids(list(range(32)))
    assert block_hashes(tokens, 16, b"short")[0] == xxhash.xxh3_128_digest(b"short" + tokens[:16].tobytes())
