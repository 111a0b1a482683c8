"""Where a block's bytes lie in blocks of another cut: against walking the block token by token and head by head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_common.comm_backend.reshape import Reshape, reshape_between
from sagellm_common.comm_backend.transcode import Transcoder, row_bytes
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import KvLayout

HEADS, HEAD_DIM = 6, 4


def a_layout(block_size_tokens: int, dtype: str, layers: int, tp: int, heads: int = HEADS) -> KvLayout:
    layout = KvLayout("m", dtype, block_size_tokens, layers, heads, HEAD_DIM, 0, tp)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * layers * block_size_tokens)


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tp=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layers=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "int8/float16"]),
    first=st.integers(0, 5),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_pieces_are_where_the_transcoder_puts_the_bytes(
    sizes: tuple[int, int], tp: tuple[int, int], layers: int, dtype: str, first: int, count: int, seed: int
) -> None:
    """`Transcoder.move`, which copies token by token, is tested against the naive oracle itself."""
    rng = np.random.default_rng(seed)
    source, target = (a_layout(size, dtype, layers, ranks) for size, ranks in zip(sizes, tp, strict=True))
    start, num_tokens = first * sizes[0], (first + count) * sizes[0]
    theirs = KvRegion(memoryview(bytearray(rng.bytes(count * source.block_bytes))), source.block_bytes, count)
    num_blocks = -(-num_tokens // sizes[1]) + 2
    expected, ours = (
        KvRegion(memoryview(bytearray(num_blocks * target.block_bytes)), target.block_bytes, num_blocks)
        for _ in range(2)
    )
    table = rng.permutation(num_blocks).astype(np.int32)
    Transcoder(source, target).move(
        theirs, np.arange(count, dtype=np.int32), expected, table, range(start, num_tokens), source_start=start
    )
    pieces = Reshape(source, target).pieces(ours, table, start, count)
    data = theirs.view
    for at, begin, size in zip(
        pieces.offsets.tolist(),
        pieces.within_units(np.arange(count) * source.block_bytes).tolist(),
        pieces.sizes.tolist(),
        strict=True,
    ):
        ours.view[at : at + size] = data[begin : begin + size]
    assert pieces.unit_sizes.tolist() == [source.block_bytes] * count
    assert ours.view.tobytes() == expected.view.tobytes()


def test_only_bytes_that_change_places_in_whole_stripes() -> None:
    one = a_layout(16, "float32", 2, 1, heads=4)
    assert reshape_between(one, a_layout(24, "float32", 2, 1, heads=4)) is not None
    assert reshape_between(one, a_layout(16, "bfloat16", 2, 1, heads=4)) is None
    assert reshape_between(one, a_layout(16, "float32", 2, 4, heads=4)) is None, "runs of 16 bytes"
