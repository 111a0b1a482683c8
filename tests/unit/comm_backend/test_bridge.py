"""What goes through a bridge, in groups of any size, is what one `Transcoder.move` of all of it gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_common.comm_backend.bridge import Buffers, Encoder, Incoming, Outgoing
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.comm_backend.transcode import Transcoder, row_bytes
from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds, KvLayout
from tests.support.kv_channels import staged

LAYERS, HEADS, HEAD_DIM = 2, 2, 4


def a_layout(size: int, dtype: str = "float32") -> KvLayout:
    layout = KvLayout("m", dtype, size, LAYERS, HEADS, HEAD_DIM, 0)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * LAYERS * size)


def a_pool(layout: KvLayout, num_blocks: int, seed: int) -> KvRegion:
    """Numbers where they are kept as they are; else whatever codes and scales those bytes are, but no NaN."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((num_blocks * layout.block_bytes) // 4).astype(np.float32)
    return KvRegion(numbers.data.cast("B"), layout.block_bytes, num_blocks)


def table(num_blocks: int, seed: int) -> BlockIds:
    return np.random.default_rng(seed).permutation(num_blocks).astype(np.int32)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["float32", "int8/float32", "bfloat16"]),
    num_tokens=st.integers(1, 40),
    skipped=st.integers(0, 4),
    groups=st.lists(st.integers(1, 5), min_size=1),
    device=st.booleans(),
)
def test_what_comes_in_ends_in_the_pool(
    sizes: tuple[int, int], dtype: str, num_tokens: int, skipped: int, groups: list[int], device: bool
) -> None:
    source, target = a_layout(sizes[0]), a_layout(sizes[1], dtype)
    tokens = range(min(skipped, (num_tokens - 1) // sizes[1]) * sizes[1], num_tokens)
    blocks = [-(-num_tokens // size) for size in sizes]
    theirs = a_pool(source, blocks[0], 1)
    mine = a_pool(target, blocks[1] + 1, 2)
    expected = KvRegion(memoryview(bytearray(mine.view)), mine.block_bytes, mine.num_blocks)
    to = table(blocks[1] + 1, 3)
    transcoder = Transcoder(source, target)
    moved = transcoder.move(theirs, np.arange(blocks[0], dtype=np.int32), expected, to, tokens)

    pool: KvMemory = staged(mine) if device else mine
    incoming = Incoming(transcoder, pool, to, tokens, Buffers())
    first, at = tokens.start // sizes[0], 0
    assert incoming.num_blocks == blocks[0] - first
    while at < incoming.num_blocks:
        ids = np.arange(at, min(at + groups[at % len(groups)], incoming.num_blocks), dtype=np.int32)
        with incoming.writing(ids) as (region, here):
            for n, slot in zip(ids.tolist(), here.tolist(), strict=True):
                region.block(slot)[:] = theirs.block(first + n)
        at += len(ids)
    incoming.wait()
    # A device's blocks are written whole: what is beyond the tokens is nobody's.
    for block, tokens_in_block in covered(tokens, sizes[1]):
        assert rows(pool, target, int(to[block]), tokens_in_block) == rows(
            expected, target, int(to[block]), tokens_in_block
        )
    if not device:
        assert mine.view.tobytes() == expected.view.tobytes()
    assert incoming.deviation.max_abs == moved.max_abs
    assert incoming.deviation.relative_rms == pytest.approx(moved.relative_rms, rel=1e-4)


def covered(tokens: range, size: int) -> list[tuple[int, int]]:
    """(block, tokens of it that are moved) from its first on."""
    return [(at // size, min(size, tokens.stop - at)) for at in range(tokens.start, tokens.stop, size)]


def rows(pool: KvMemory, layout: KvLayout, block: int, num_tokens: int) -> bytes:
    """The first tokens of a block, of all layers and kinds."""
    with pool.reading(np.array([block], np.int32)) as (region, ids):
        data, at, found = bytes(region.block(int(ids[0]))), 0, b""
        for row in row_bytes(layout):
            for _ in range(layout.num_layers):
                found += data[at : at + num_tokens * row]
                at += layout.block_size_tokens * row
        return found


def test_blocks_come_in_order_and_once() -> None:
    source, target = a_layout(4), a_layout(2)
    incoming = Incoming(Transcoder(source, target), a_pool(target, 9, 0), table(9, 0), range(16), Buffers())
    with incoming.writing(np.array([0, 1], np.int32)):
        pass
    with (
        pytest.raises(ValueError, match=r"\[1, 2\] were filled after 2 of 4"),
        incoming.writing(np.array([1, 2], np.int32)),
    ):
        pass
    incoming.wait()


@pytest.mark.parametrize("device", [False, True])
def test_after_a_failure_another_writer_begins_anew(device: bool) -> None:
    """As when a byte path fails half-way and the next one takes over."""
    source, target = a_layout(4), a_layout(3, "int8/float32")
    theirs, mine, to = a_pool(source, 4, 1), a_pool(target, 6, 2), table(6, 3)
    expected = KvRegion(memoryview(bytearray(mine.view)), mine.block_bytes, mine.num_blocks)
    transcoder = Transcoder(source, target)
    once = transcoder.move(theirs, np.arange(4, dtype=np.int32), expected, to, range(15))
    incoming = Incoming(transcoder, staged(mine) if device else mine, to, range(15), Buffers())
    for ids, data in (([0, 1], b"\0"), ([0], None), ([1, 2, 3], None)):
        with incoming.writing(np.array(ids, np.int32)) as (region, here):
            for block, slot in zip(ids, here.tolist(), strict=True):
                region.block(slot)[:] = theirs.block(block) if data is None else data * source.block_bytes
    incoming.wait()
    assert mine.view.tobytes() == expected.view.tobytes()
    assert incoming.deviation.relative_rms == pytest.approx(once.relative_rms, rel=1e-4)


def test_a_group_that_fails_leaves_the_pool_alone() -> None:
    source, target = a_layout(4), a_layout(2)
    pool = a_pool(target, 8, 0)
    before = bytes(pool.view)
    incoming = Incoming(Transcoder(source, target), pool, table(8, 0), range(16), Buffers())
    with pytest.raises(RuntimeError, match="corrupt"), incoming.writing(np.array([0], np.int32)):
        raise RuntimeError("corrupt")
    incoming.wait()
    assert bytes(pool.view) == before


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("partial", [1, 3, 4])
def test_what_goes_out_is_converted_as_far_as_it_counts(device: bool, partial: int) -> None:
    layout, wire = a_layout(4), a_layout(4, "int8/float32")
    pool = a_pool(layout, 6, 5)
    ids = np.array([4, 0, 3], np.int32)
    # What was never written may be anything.
    unused = np.frombuffer(pool.block(3), np.float32).reshape(2 * LAYERS, 4, -1)
    unused[:, partial:] = np.nan
    expected = KvRegion(memoryview(bytearray(3 * wire.block_bytes)), wire.block_bytes, 3)
    transcoder, staging = Transcoder(layout, wire), np.arange(3, dtype=np.int32)
    deviation = transcoder.move(pool, ids, expected, staging, range(8 + partial))
    assert deviation.non_finite == 0

    outgoing = Outgoing(transcoder, staged(pool) if device else pool, Buffers(), (3, partial))
    found = []
    for group in (ids[:2], ids[2:]):
        with outgoing.reading(group) as (region, here):
            found += [bytes(region.block(int(n))) for n in here]
    assert found == [bytes(expected.block(n)) for n in range(3)]
    assert outgoing.deviation.max_abs == deviation.max_abs
    assert outgoing.deviation.non_finite == 0


def test_a_dtype_that_cannot_be_made_of_the_pools_is_refused() -> None:
    pool = a_pool(a_layout(4), 2, 0)
    encoder = Encoder(lambda: pool, lambda: a_layout(4))
    assert encoder("bfloat16", (0, 4)).block_bytes == pool.block_bytes // 2
    with pytest.raises(LayoutMismatch, match="cannot be sent as 'float64': known are float32, bfloat16"):
        encoder("float64", (0, 4))
    odd = replace(a_layout(4), dtype="float32@ascend")
    with pytest.raises(LayoutMismatch, match="dtype is 'float32@ascend' on the source"):
        Encoder(lambda: pool, lambda: odd)("int8/float32", (0, 4))


def test_a_deviation_through_two_dtypes_is_at_most_the_sum() -> None:
    layouts = [a_layout(4, dtype) for dtype in ("float32", "int8/float32", "float8_e4m3fn")]
    pools, ids = (
        [a_pool(layouts[0], 3, 7), *(a_pool(layout, 3, 0) for layout in layouts[1:])],
        np.arange(3, dtype=np.int32),
    )
    steps = [
        Transcoder(a, b).move(p, ids, q, ids, range(12))
        for a, b, p, q in zip(layouts, layouts[1:], pools, pools[1:], strict=False)
    ]
    back = KvRegion(memoryview(bytearray(len(pools[0].view))), layouts[0].block_bytes, 3)
    Transcoder(layouts[2], layouts[0]).move(pools[2], ids, back, ids, range(12))
    whole = Deviation()
    whole.observe(np.frombuffer(pools[0].view, np.float32), np.frombuffer(back.view, np.float32).copy())
    bound = steps[0].then(steps[1])
    assert 0 < whole.max_abs <= bound.max_abs
    assert 0 < whole.relative_rms <= bound.relative_rms * 1.001
