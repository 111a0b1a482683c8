"""Transcoding against the naive oracle: token by token, plane by plane."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.comm_backend.transcode import Transcoder, check_bridgeable, cut, obstacles, row_bytes
from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import KvLayout

DTYPES = ("float32", "bfloat16", "float16", "int8/float32", "int4/bfloat16")


HEADS = 12


def a_layout(block_size_tokens: int, dtype: str = "float32", layers: int = 2, tp: int = 1) -> KvLayout:
    layout = KvLayout("m", dtype, block_size_tokens, layers, HEADS, 4, 0, tp)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * layers * block_size_tokens)


def naive_heads(region: KvRegion, layout: KvLayout, block: int, slot: int) -> dict[tuple[int, int, int], memoryview]:
    """The bytes of one token by kind, layer and head, found by walking the block."""
    at, found = 0, {}
    for rank in range(layout.tp):
        for kind, all_heads in enumerate(row_bytes(layout)):
            for layer in range(layout.num_layers):
                for token in range(layout.block_size_tokens):
                    for head in range(HEADS // layout.tp):
                        end = at + all_heads // HEADS
                        if token == slot:
                            found[kind, layer, rank * HEADS // layout.tp + head] = region.block(block)[at:end]
                        at = end
    assert at == layout.block_bytes
    return found


def naive_move(source, source_layout, source_blocks, target, target_layout, target_blocks, begin, end):  # type: ignore[no-untyped-def]
    for token in range(begin, end):
        from_index, from_slot = divmod(token, source_layout.block_size_tokens)
        to_index, to_slot = divmod(token, target_layout.block_size_tokens)
        theirs = naive_heads(source, source_layout, int(source_blocks[from_index]), from_slot)
        mine = naive_heads(target, target_layout, int(target_blocks[to_index]), to_slot)
        assert mine.keys() == theirs.keys()
        for head, view in mine.items():
            view[:] = theirs[head]


def a_pool(layout: KvLayout, num_blocks: int, rng: np.random.Generator) -> KvRegion:
    return KvRegion(
        rng.integers(0, 256, num_blocks * layout.block_bytes, np.uint8).data, layout.block_bytes, num_blocks
    )


@given(
    source_size=st.integers(1, 12),
    target_size=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 2),
    tp=st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3, 4])),
    num_tokens=st.integers(1, 40),
    skipped_blocks=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_arrives_where_it_belongs_and_nothing_else_is_touched(
    source_size: int,
    target_size: int,
    dtype: str,
    layers: int,
    tp: tuple[int, int],
    num_tokens: int,
    skipped_blocks: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    source_layout, target_layout = (
        a_layout(size, dtype, layers, ranks) for size, ranks in zip((source_size, target_size), tp, strict=True)
    )
    begin = min(skipped_blocks, num_tokens // target_size) * target_size
    tables, pools = [], []
    for layout in (source_layout, target_layout):
        needed = -(-num_tokens // layout.block_size_tokens)
        pools.append(a_pool(layout, needed + 2, rng))
        tables.append(rng.permutation(needed + 2)[:needed].astype(np.int32))
    expected = KvRegion(memoryview(bytearray(pools[1].view)), target_layout.block_bytes, pools[1].num_blocks)
    # The last piece is moved whole: up to its end, which lies within both blocks, the target gets what the source has.
    piece = int(np.gcd(source_size, target_size))
    end = -(-num_tokens // piece) * piece if num_tokens > begin else begin
    naive_move(pools[0], source_layout, tables[0], expected, target_layout, tables[1], begin, end)

    Transcoder(source_layout, target_layout).move(pools[0], tables[0], pools[1], tables[1], begin, num_tokens)
    assert pools[1].view.tobytes() == expected.view.tobytes()


@given(st.integers(1, 256), st.integers(1, 256), st.integers(0, 20), st.integers(0, 3000))
def test_pieces_cover_the_run_once_and_cross_no_block(
    source_size: int, target_size: int, first_block: int, length: int
) -> None:
    begin = first_block * target_size
    pieces = cut(begin, begin + length, source_size, target_size)
    for size, index, place in (
        (source_size, pieces.source_index, pieces.source_place),
        (target_size, pieces.target_index, pieces.target_place),
    ):
        starts = index * size + place * pieces.num_tokens
        assert ((place >= 0) & ((place + 1) * pieces.num_tokens <= size)).all()
        assert np.array_equal(starts, begin + np.arange(len(starts)) * pieces.num_tokens)
        assert 0 <= len(starts) * pieces.num_tokens - length < pieces.num_tokens


def test_a_run_begins_where_a_piece_does() -> None:
    with pytest.raises(ValueError, match="token 5 is within a piece of 4 tokens"):
        cut(5, 9, 8, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_block_size_or_number_of_ranks_is_bridged(dtype: str) -> None:
    assert obstacles(a_layout(16, dtype), a_layout(32, dtype, tp=2)) == {}
    check_bridgeable(a_layout(5, dtype), a_layout(3, dtype), "a", "b")


MINE = a_layout(16)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (replace(a_layout(32), model_fingerprint="x"), "model_fingerprint is 'm' on p and 'x' on d; .*model.path"),
        (a_layout(32, "int8/float32"), "dtype is 'float32' on p and 'int8/float32' on d; .*engine.kv_quant_bits"),
        (a_layout(16, "bfloat16"), "dtype is 'float32' on p and 'bfloat16' on d; .*engine.dtype"),
        (a_layout(16, layers=4), "num_layers is 2 on p and 4 on d; run all workers with one model"),
        (replace(a_layout(16), tp=5), "tp is 1 on p and 5 on d; .*one engine section"),  # does not divide the heads
        (replace(a_layout(32), pp=2), "pp is 1 on p and 2 on d; .*one pipeline-parallel size"),
        # Rows that are not what the fields say (keys and values of different sizes, say) cannot be told apart.
        (replace(a_layout(32), block_bytes=1000), "block_size_tokens is 16 on p and 32 on d, block_bytes is"),
        (replace(MINE, block_bytes=1000), "block_bytes is 12288 on p and 1000 on d; run all workers"),
    ],
)
def test_what_is_not_bridged_is_named_with_both_values_and_the_fix(theirs: KvLayout, named: str) -> None:
    with pytest.raises(LayoutMismatch, match=named) as caught:
        check_bridgeable(MINE, theirs, "p", "d")
    assert caught.value.metadata == {name: f"{a}|{b}" for name, (a, b) in obstacles(MINE, theirs).items()}
    assert set(caught.value.metadata) <= {name for name, _ in MINE.differences(theirs).items()}
    with pytest.raises(LayoutMismatch):
        Transcoder(MINE, theirs)


def test_an_unknown_dtype_is_bridged_to_itself_alone() -> None:
    odd = replace(MINE, dtype="float8")
    assert obstacles(odd, odd) == {}
    assert obstacles(odd, replace(odd, block_size_tokens=32)) == {"block_size_tokens": (16, 32)}
