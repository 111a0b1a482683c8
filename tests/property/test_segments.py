"""Cutting a growing KV into segments, against a set of (block, layer): each once, none early, all in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.comm_backend.segments import Segment, SegmentCutter, split
from sagellm_common.core.kv_progress import KvProgress, Watermark


@st.composite
def computations(draw: st.DrawFn) -> tuple[KvProgress, int, list[Watermark]]:
    """A prompt's progress, its number of layers, and the watermarks that a source happened to see of it."""
    block_size, num_layers = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_tokens = draw(st.integers(1, 40))
    cached = draw(st.integers(0, (num_tokens - 1) // block_size)) * block_size
    progress = KvProgress(num_tokens, cached, block_size)
    marks, end = [progress.watermark], cached
    while end < num_tokens:
        end = min(num_tokens, end + draw(st.integers(1, num_tokens)))
        progress.chunk_begins(end)
        for layer in range(draw(st.integers(0, num_layers))):
            progress.layer_done(layer)
            marks.append(progress.watermark)
        progress.chunk_done()
        marks.append(progress.watermark)
    seen = [mark for mark in marks[:-1] if draw(st.booleans())]
    return progress, num_layers, [*seen, marks[-1]]


def cells(segment: Segment) -> set[tuple[int, int]]:
    blocks = range(segment.first_block, segment.end_block)
    return {(block, layer) for block in blocks for layer in range(segment.first_layer, segment.end_layer)}


@given(computations(), st.integers(0, 60), st.integers(1, 30))
def test_each_once_none_early_all_in_the_end(
    computation: tuple[KvProgress, int, list[Watermark]], skipped: int, min_block_layers: int
) -> None:
    progress, num_layers, marks = computation
    size, num_tokens = progress.block_size_tokens, progress.num_tokens
    num_blocks = -(-num_tokens // size)
    first = min(skipped, num_blocks)
    cutter = SegmentCutter(first, num_tokens, size, num_layers, min_block_layers)
    sent: set[tuple[int, int]] = set()
    for mark in marks:
        for segment in cutter.cut(mark):
            found = cells(segment)
            assert found
            assert not found & sent, "sent twice"
            sent |= found
            for block, layer in found:
                last_token = min(num_tokens, (block + 1) * size)
                assert last_token <= mark.tokens or (last_token <= mark.chunk_end and layer < mark.layers), "early"
    assert cutter.finished
    assert sent == {(block, layer) for block in range(first, num_blocks) for layer in range(num_layers)}


@given(
    st.integers(0, 9), st.integers(1, 30), st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 99)
)
def test_split_keeps_all_of_it(
    block: int, num_blocks: int, layer: int, num_layers: int, layer_bytes: int, max_bytes: int
) -> None:
    whole = Segment(block, block + num_blocks, layer, layer + num_layers)
    parts = list(split(whole, layer_bytes, max_bytes))
    assert [parts[0].first_block, *(part.end_block for part in parts)] == [
        *(part.first_block for part in parts),
        whole.end_block,
    ]
    assert all((part.first_layer, part.end_layer) == (layer, layer + num_layers) for part in parts)
    assert all(part.num_blocks == 1 or part.num_blocks * num_layers * layer_bytes <= max_bytes for part in parts)
