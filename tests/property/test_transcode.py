"""Transcoding against the naive oracle: token by token, head by head, with the engine's own quantiser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_common.comm_backend.transcode import Transcoder, check_bridgeable, obstacles, row_bytes, runs
from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import KvLayout
from sagellm_common.engines.lmdeploy.device_cpu.attention import dequantize, quantize

HEADS, HEAD_DIM = 6, 4
TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
BITS = {"int8": 8, "int4": 4}
DTYPES = (*TORCH, *(f"{codes}/{scales}" for codes in BITS for scales in ("float32", "bfloat16", "float16")))

Place = tuple[int, int, int]
"""kind (keys or values), layer, head"""


def a_layout(block_size_tokens: int, dtype: str = "float32", layers: int = 2, tp: int = 1) -> KvLayout:
    layout = KvLayout("m", dtype, block_size_tokens, layers, HEADS, HEAD_DIM, 0, tp)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * layers * block_size_tokens)


def naive_heads(region: KvRegion, layout: KvLayout, block: int, slot: int) -> dict[Place, list[memoryview]]:
    """The bytes of one token's numbers, and of its scales if any, by kind, layer and head: found by walking the block.

    That walk, and not `row_bytes`, says what a block looks like.
    """
    codes, _, scales = layout.dtype.partition("/")
    code_bytes = HEAD_DIM * BITS[codes] // 8 if scales else HEAD_DIM * TORCH[codes].itemsize
    head_bytes = [code_bytes] * 2 + ([2 * TORCH[scales].itemsize] * 2 if scales else [])
    at, found = 0, {}
    for rank in range(layout.tp):
        for part, size in enumerate(head_bytes):
            for layer in range(layout.num_layers):
                for token in range(layout.block_size_tokens):
                    for head in range(HEADS // layout.tp):
                        if token == slot:
                            place = part % 2, layer, rank * HEADS // layout.tp + head
                            found.setdefault(place, []).append(region.block(block)[at : at + size])
                        at += size
    assert at == layout.block_bytes
    return found


def naive_convert(parts: list[memoryview], source: str, target: str) -> list[bytes]:
    """What an engine would read from the bytes, as another would write it."""
    if source == target:
        return [bytes(part) for part in parts]
    codes, _, scales = source.partition("/")
    data = torch.frombuffer(bytearray(parts[0]), dtype=torch.uint8)
    if scales:
        scale = torch.frombuffer(bytearray(parts[1]), dtype=TORCH[scales])
        numbers = dequantize(data, scale, BITS[codes], torch.float32)
    else:
        numbers = data.view(TORCH[codes]).float()
    codes, _, scales = target.partition("/")
    if scales:
        made, scale = quantize(numbers, BITS[codes])
        return [made.numpy().tobytes(), scale.to(TORCH[scales]).view(torch.uint8).numpy().tobytes()]
    if codes == "float8_e4m3fn":
        numbers = numbers.clamp(-448, 448)  # torch does not saturate
    return [numbers.to(TORCH[codes]).view(torch.uint8).numpy().tobytes()]


def naive_move(source, source_layout, source_blocks, target, target_layout, target_blocks, begin, end):  # type: ignore[no-untyped-def]
    for token in range(begin, end):
        from_index, from_slot = divmod(token, source_layout.block_size_tokens)
        to_index, to_slot = divmod(token, target_layout.block_size_tokens)
        theirs = naive_heads(source, source_layout, int(source_blocks[from_index]), from_slot)
        mine = naive_heads(target, target_layout, int(target_blocks[to_index]), to_slot)
        assert mine.keys() == theirs.keys()
        for place, views in mine.items():
            converted = naive_convert(theirs[place], source_layout.dtype, target_layout.dtype)
            for view, data in zip(views, converted, strict=True):
                view[:] = data


def a_pool(layout: KvLayout, num_blocks: int, rng: np.random.Generator) -> KvRegion:
    """Blocks of numbers as an engine keeps them, of any magnitude. No head has both 0 and -0, of which either may be
    its least number: its zero point is 0 then, of either sign."""
    data = rng.integers(0, 256, num_blocks * layout.block_bytes, np.uint8)
    region = KvRegion(data.data, layout.block_bytes, num_blocks)
    for block in range(num_blocks):
        for slot in range(layout.block_size_tokens):
            for parts in naive_heads(region, layout, block, slot).values():
                exponent = rng.integers(-5, 4)
                numbers = (rng.standard_normal(HEAD_DIM) * 10.0**exponent).astype(np.float32)
                numbers = np.abs(numbers) if exponent < 0 else numbers
                encoded = naive_convert([numbers.data.cast("B")], "float32", layout.dtype)
                for view, made in zip(parts, encoded, strict=True):
                    view[:] = made
    return region


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layers=st.integers(1, 2),
    tp=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    num_tokens=st.integers(1, 24),
    skipped=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_arrives_where_it_belongs_and_nothing_else_is_touched(
    sizes: tuple[int, int],
    dtypes: tuple[str, str],
    layers: int,
    tp: tuple[int, int],
    num_tokens: int,
    skipped: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    source_layout, target_layout = map(a_layout, sizes, dtypes, (layers, layers), tp)
    begin = min(skipped, num_tokens)
    tables, pools = [], []
    for layout in (source_layout, target_layout):
        needed = -(-num_tokens // layout.block_size_tokens)
        pools.append(a_pool(layout, needed + 1, rng))
        tables.append(rng.permutation(needed + 1)[:needed].astype(np.int32))
    expected = KvRegion(memoryview(bytearray(pools[1].view)), target_layout.block_bytes, pools[1].num_blocks)
    naive_move(pools[0], source_layout, tables[0], expected, target_layout, tables[1], begin, num_tokens)

    # Tables that begin later name the same blocks.
    starts = [begin // size * size for size in sizes]
    Transcoder(source_layout, target_layout).move(
        pools[0],
        tables[0][starts[0] // sizes[0] :],
        pools[1],
        tables[1][starts[1] // sizes[1] :],
        range(begin, num_tokens),
        source_start=starts[0],
        target_start=starts[1],
    )
    assert pools[1].view.tobytes() == expected.view.tobytes()


@given(st.integers(1, 256), st.integers(1, 256), st.integers(0, 3000), st.integers(0, 3000))
def test_runs_cover_the_tokens_once_and_cross_no_block(size: int, other: int, begin: int, length: int) -> None:
    found = list(runs(begin, begin + length, size, other))
    assert [token for run in found for token in run] == list(range(begin, begin + length))
    for run in found:
        for block_size in (size, other):
            assert run.start // block_size == (run.stop - 1) // block_size
    assert len(found) <= length // size + length // other + 3


@pytest.mark.parametrize("theirs", DTYPES)
@pytest.mark.parametrize("mine", DTYPES)
def test_another_dtype_block_size_or_number_of_ranks_is_bridged(mine: str, theirs: str) -> None:
    assert obstacles(a_layout(16, mine), a_layout(32, theirs, tp=2)) == {}
    check_bridgeable(a_layout(5, mine), a_layout(3, theirs), "a", "b")


MINE = a_layout(16)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (replace(a_layout(32), model_fingerprint="x"), "model_fingerprint is 'm' on p and 'x' on d; .*model.path"),
        (replace(MINE, dtype="float32@ascend"), "dtype is 'float32' on p and 'float32@ascend' on d; .*engine.device"),
        (replace(MINE, dtype="int4/float32", head_dim=5), "dtype is .*head_dim is 4 on p and 5 on d"),
        (a_layout(16, layers=4), "num_layers is 2 on p and 4 on d; run all workers with one model"),
        (replace(a_layout(16), tp=4), "tp is 1 on p and 4 on d; .*one engine section"),  # does not divide the heads
        (replace(a_layout(32), pp=2), "pp is 1 on p and 2 on d; .*one pipeline-parallel size"),
        # Rows that are not what the fields say (keys and values of different sizes, say) cannot be told apart.
        (replace(a_layout(32), block_bytes=1000), "block_size_tokens is 16 on p and 32 on d, block_bytes is"),
        (replace(MINE, block_bytes=1000), "block_bytes is 6144 on p and 1000 on d; run all workers"),
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
