"""The CPU attention against a softmax over whole sequences, with tiles small enough to be many."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.engines.lmdeploy.device_cpu import attention
from sagellm_common.engines.lmdeploy.device_cpu.attention import (
    CpuAttentionBuilder,
    dequantize,
    plan_decode,
    quantize,
)
from sagellm_common.engines.lmdeploy.device_cpu.backend import CpuOpsBackend

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 4, 2, 16, 4


class Sequences:
    """Grows by steps, through the backend and in plain tensors beside it. Unwritten slots hold NaN."""

    def __init__(self, count: int, max_tokens: int, bits: int = 0) -> None:
        width = -(-max_tokens // BLOCK_SIZE)
        self.bits = bits
        self.blocks = torch.randperm(count * width).view(count, width)
        shape = (count * width, BLOCK_SIZE, KV_HEADS)
        if bits:
            codes = [torch.full((*shape, DIM * bits // 8), 255, dtype=torch.uint8) for _ in range(2)]
            self.caches = [*codes, *(torch.full((*shape, 2), torch.nan) for _ in range(2))]
        else:
            self.caches = [*(torch.full((*shape, DIM), torch.nan) for _ in range(2)), None, None]
        self.kv = [(torch.zeros(0, KV_HEADS, DIM), torch.zeros(0, KV_HEADS, DIM)) for _ in range(count)]
        self.impl = CpuAttentionBuilder.build(HEADS, DIM, num_kv_heads=KV_HEADS)

    def as_stored(self, new: torch.Tensor) -> torch.Tensor:
        return dequantize(*quantize(new, self.bits), self.bits, new.dtype) if self.bits else new

    def step(self, *lens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, expected) for so many new tokens of each sequence."""
        q, k, v = (torch.randn(sum(lens), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        news = [part.split(lens) for part in (q, k, v)]
        expected = []
        for i, (new_q, new_k, new_v) in enumerate(zip(*news, strict=True)):
            stored = (self.as_stored(new_k), self.as_stored(new_v))
            keys, values = (torch.cat(pair) for pair in zip(self.kv[i], stored, strict=True))
            self.kv[i] = (keys, values)
            expected.append(naive(new_q, keys, values))
        context = types.SimpleNamespace(
            kv_caches=[self.caches],
            q_seqlens=torch.tensor(lens),
            kv_seqlens=torch.tensor([len(keys) for keys, _ in self.kv]),
            block_offsets=self.blocks,
            is_decoding=max(lens) == 1,
            kv_quant_policy=self.bits,
        )
        metadata = CpuOpsBackend.update_step_context(context).attn_metadata
        out = self.impl.forward(q, k, v, self.caches[0], self.caches[1], metadata, self.caches[2], self.caches[3])
        return out, torch.cat(expected)


def naive(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    groups = HEADS // KV_HEADS
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / DIM**0.5
    visible = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)


@pytest.fixture(params=[(4, 8), (8, 1000), (1000, 1000)], ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "TILE_TOKENS", request.param[0])
    monkeypatch.setattr(attention, "GATHER_TOKENS", request.param[1])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_prompts_chunks_and_decoding_equal_one_softmax(bits: int) -> None:
    sequences = Sequences(4, 64, bits)
    for lens in ((5, 1, 16, 8), (11, 3, 1, 8), (1, 1, 1, 1), (1, 1, 1, 1), (9, 1, 2, 5), (1, 1, 1, 1)):
        out, expected = sequences.step(*lens)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@given(
    kv_lens=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    block_size=st.sampled_from([1, 3, 16]),
    tile=st.sampled_from([1, 16, 64]),
    gather=st.sampled_from([16, 128, 10_000]),
)
def test_decode_tiles_cover_every_token_once_and_bound_what_is_gathered(
    kv_lens: list[int], block_size: int, tile: int, gather: int
) -> None:
    width = -(-max(kv_lens) // block_size)
    table = torch.arange(len(kv_lens) * width).view(len(kv_lens), width)

    def tokens(lens: list[int], rows: torch.Tensor) -> dict[int, list[tuple[int, ...]]]:
        """Which slots each row attends to, tile by tile."""
        seen: dict[int, list[tuple[int, ...]]] = {row: [] for row in range(len(lens))}
        for planned in plan_decode(rows, lens, block_size):
            slots = (planned.blocks[..., None] * block_size + torch.arange(block_size)).flatten(1)
            assert slots.numel() <= max(gather, max(tile, block_size))
            chosen = torch.arange(len(lens))[planned.rows].tolist()
            for i, row in enumerate(chosen):
                visible = slots[i] if planned.mask is None else slots[i][planned.mask[i, 0, 0] == 0]
                seen[row].append(tuple(visible.tolist()))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE_TOKENS", tile)
        patch.setattr(attention, "GATHER_TOKENS", gather)
        together = tokens(kv_lens, table)
        for row, length in enumerate(kv_lens):
            first = row * width * block_size
            assert [slot for part in together[row] for slot in part] == list(range(first, first + length))
            assert tokens([length], table[row : row + 1])[0] == together[row]  # whoever else is in the batch


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alibi": True}, "ALiBi"), ({"logit_softcapping": 30.0}, "soft-capping"), ({"sliding_window": (4, 4)}, "window")],
)
def test_what_it_does_not_know_is_refused(options: dict[str, Any], message: str) -> None:
    sequences = Sequences(1, 16)
    sequences.impl = CpuAttentionBuilder.build(HEADS, DIM, num_kv_heads=KV_HEADS, **options)
    with pytest.raises(ValueError, match=message):
        sequences.step(8)
    with pytest.raises(ValueError, match="one size, not 16 and 8"):
        CpuAttentionBuilder.build(HEADS, DIM, v_head_size=8)
