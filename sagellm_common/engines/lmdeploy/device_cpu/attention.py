"""Paged attention in plain torch: KV is gathered tile by tile, and each tile's answer weighed by its share.

    out = Σ out_tile · exp(lse_tile - lse)        lse = log Σ exp(lse_tile)

A tile is at most TILE_TOKENS long, and no mask is ever as large as queries × keys: what a step needs in memory does not
grow with the context.

All of it is computed in float32, whatever the model's dtype: how sums are grouped depends on block size, chunks and
neighbours, and what that changes in float32 is far below what bfloat16 keeps.

Shapes: T new tokens of a step over all sequences, H heads, D head size, block table [sequences, blocks].
Caches are [num_blocks, block_size, kv_heads, D] (D / 2 packed for int4), scales and zeros [..., 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from lmdeploy.pytorch.backends.attention import AttentionBuilder, AttentionImpl, AttentionMetadata
from torch import Tensor

from sagellm_common.engines.lmdeploy.kernels.ops import Batch

TILE_TOKENS = 4096
"""KV tokens of one sequence that are gathered at a time."""
GATHER_TOKENS = 16384
"""The same over all sequences of a decode step, padding included."""


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """A stretch of KV that some sequences with one new token each have, padded to the longest of them."""

    rows: Tensor | slice  # which sequences, [b]
    blocks: Tensor  # [b, n] physical blocks
    shortest: int  # tokens that all of them have here; the others are padded from there on
    padding: Tensor  # bool [b, n * block_size - shortest, 1, 1]
    mask: Tensor | None  # additive, [b, 1, 1, n * block_size]; None where nothing is padded


@dataclass
class CpuAttentionMetadata(AttentionMetadata):
    """What all layers of one step share, worked out once; what only torch's attention needs, when it is asked for."""

    batch: Batch | None = None
    block_size: int = 0
    q_lens: tuple[int, ...] = ()
    kv_lens: tuple[int, ...] = ()

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """[T] physical block of each new token, and [T] its slot in that block."""
        q, kv = self.q_seqlens, self.kv_seqlens
        sequence = torch.repeat_interleave(torch.arange(q.numel()), q)
        position = torch.arange(int(q.sum())) - self.q_start_loc[sequence] + (kv - q)[sequence]
        return self.block_offsets[sequence, position // self.block_size], position % self.block_size

    @cached_property
    def decode_tiles(self) -> tuple[DecodeTile, ...]:
        """When every sequence has one new token."""
        decoding = self.is_decoding and max(self.q_lens) == 1
        return plan_decode(self.block_offsets, self.kv_lens, self.block_size) if decoding else ()


def plan_decode(block_table: Tensor, kv_lens: Sequence[int], block_size: int) -> tuple[DecodeTile, ...]:
    """Covers every token of every sequence once. A sequence is cut the same way whoever else is in the batch."""
    tile_blocks = max(1, TILE_TOKENS // block_size)
    num_blocks = [-(-length // block_size) for length in kv_lens]
    shortest_first = sorted(range(len(kv_lens)), key=num_blocks.__getitem__)
    tiles = []
    for first in range(0, max(num_blocks), tile_blocks):
        waiting = [row for row in shortest_first if num_blocks[row] > first]
        while waiting:
            # From the longest on, so that sequences of a kind are padded together.
            width = min(num_blocks[waiting[-1]] - first, tile_blocks)
            count = max(1, GATHER_TOKENS // (width * block_size))
            waiting, rows = waiting[:-count], sorted(waiting[-count:])
            chosen = torch.tensor(rows)
            left = [min(kv_lens[row] - first * block_size, width * block_size) for row in rows]
            padding = torch.arange(width * block_size) >= torch.tensor(left)[:, None]
            mask = torch.zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, None, None]
            tiles.append(
                DecodeTile(
                    rows=chosen if len(rows) < len(kv_lens) else slice(None),
                    blocks=block_table[chosen, first : first + width],
                    shortest=min(left),
                    padding=padding[:, min(left) :, None, None],
                    mask=mask if min(left) < width * block_size else None,
                )
            )
    return tuple(tiles)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Affine per (token, head) quantisation, as LMDeploy's kernels/cuda/fill_kv_cache.py does it.

    Returns the codes (uint8; two per byte for 4 bits: first half of D in the low nibble) and [..., 2] scale and zero.
    """
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    levels = (1 << bits) - 1
    scale = (high - low).clamp_min(1e-8) / levels
    zero = -low / scale
    codes = (x / scale[..., None] + zero[..., None] + 0.5).clamp(0, levels).to(torch.uint8)
    if bits == 4:
        half = x.size(-1) // 2
        codes = codes[..., :half] + codes[..., half:] * 16
    return codes, torch.stack([scale, zero], -1)


def dequantize(codes: Tensor, scales_zeros: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    if bits == 4:
        codes = torch.cat([codes & 0xF, codes >> 4], -1)
    scales_zeros = scales_zeros.float()
    return ((codes.float() - scales_zeros[..., 1:2]) * scales_zeros[..., 0:1]).to(dtype)


@dataclass(frozen=True, slots=True)
class _Cache:
    """One layer's keys or values."""

    data: Tensor
    scales_zeros: Tensor | None
    bits: int

    def gather(self, blocks: Tensor) -> Tensor:
        """Blocks [..., n] → float32 [..., n * block_size, kv_heads, D]."""
        found = self.data[blocks]
        if self.bits:
            assert self.scales_zeros is not None
            found = dequantize(found, self.scales_zeros[blocks], self.bits, torch.float32)
        return found.float().flatten(-4, -3)

    def write(self, new: Tensor, blocks: Tensor, slots: Tensor) -> None:
        if self.bits:
            assert self.scales_zeros is not None
            codes, scales_zeros = quantize(new, self.bits)
            self.data[blocks, slots] = codes
            self.scales_zeros[blocks, slots] = scales_zeros.to(self.scales_zeros.dtype)
        else:
            self.data[blocks, slots] = new


class CpuAttentionImpl(AttentionImpl[CpuAttentionMetadata]):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        attn_metadata: CpuAttentionMetadata,
        k_scales_zeros: Tensor | None = None,
        v_scales_zeros: Tensor | None = None,
        learnable_sink: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """query [T, H, D], key and value [T, kv_heads, D] → [T, H, D]. Writes key and value into the caches."""
        if learnable_sink is not None or self.alibi or self.logit_softcapping:
            raise ValueError("the CPU attention knows no sinks, ALiBi or logit soft-capping")
        meta = attn_metadata
        window = self.sliding_window[0] if self.sliding_window else 0
        if 0 < window < max(meta.kv_lens):
            raise ValueError(f"the CPU attention knows no sliding window; {max(meta.kv_lens)} tokens exceed {window}")
        keys = _Cache(k_cache, k_scales_zeros, meta.quant_policy)
        values = _Cache(v_cache, v_scales_zeros, meta.quant_policy)
        keys.write(key, *meta.slots)
        values.write(value, *meta.slots)
        dtype = query.dtype
        query, key, value = query.float(), key.float(), value.float()
        if meta.decode_tiles:
            return self._decode(query, keys, values, meta.decode_tiles).to(dtype)
        outputs, start = [], 0
        for i, (q_len, kv_len) in enumerate(zip(meta.q_lens, meta.kv_lens, strict=True)):
            new = slice(start, start + q_len)
            outputs.append(
                self._prefill(query[new], key[new], value[new], keys, values, meta.block_offsets[i], kv_len - q_len)
            )
            start += q_len
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 0)).to(dtype)

    def _decode(self, query: Tensor, keys: _Cache, values: _Cache, tiles: Sequence[DecodeTile]) -> Tensor:
        """One new token per sequence: query [B, H, D] → [B, H, D]."""
        merged = _Merged(query)
        for tile in tiles:
            k, v = keys.gather(tile.blocks), values.gather(tile.blocks)
            mask = None
            if tile.mask is not None:
                # A mask hides no NaN, and slots not written yet hold whatever was there before.
                k[:, tile.shortest :].masked_fill_(tile.padding, 0)
                v[:, tile.shortest :].masked_fill_(tile.padding, 0)
                mask = tile.mask
            q = query[tile.rows, :, None]
            out, lse = self._attend(q, k.transpose(1, 2), v.transpose(1, 2), mask=mask)
            if len(tiles) == 1:
                return out[:, :, 0]
            merged.add(tile.rows, out[:, :, 0], lse[:, :, 0])
        return merged.out

    def _prefill(
        self, query: Tensor, key: Tensor, value: Tensor, keys: _Cache, values: _Cache, blocks: Tensor, history: int
    ) -> Tensor:
        """Some new tokens of one sequence: query [q, H, D] → [q, H, D]. `history` tokens are in the cache before."""
        block_size = keys.data.size(1)
        if keys.bits:
            # What later steps will read, not what it was made from: chunks do not change the answer.
            first, last = history // block_size, -(-(history + len(query)) // block_size)
            here = slice(history - first * block_size, history - first * block_size + len(query))
            key, value = (cache.gather(blocks[first:last])[here] for cache in (keys, values))
        q = query.transpose(0, 1)[None]
        out, lse = self._attend(q, key.transpose(0, 1)[None], value.transpose(0, 1)[None], is_causal=True)
        if not history:
            return out[0].transpose(0, 1)
        merged = _Merged(query)
        every = slice(None)
        merged.add(every, out[0].transpose(0, 1), lse[0].T)
        tile_blocks = max(1, TILE_TOKENS // block_size)
        for first in range(0, -(-history // block_size), tile_blocks):
            tile, left = blocks[first : first + tile_blocks], history - first * block_size
            k, v = (cache.gather(tile)[:left].transpose(0, 1)[None] for cache in (keys, values))
            out, lse = self._attend(q, k, v)
            merged.add(every, out[0].transpose(0, 1), lse[0].T)
        return merged.out

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scores all of [b, H, q, D] against [b, kv_heads, n, D], mask [b, 1, 1, n]; and its log-sum-exp [b, H, q].

        The op under `scaled_dot_product_attention`, which keeps the log-sum-exp to itself.
        """
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key,
            value,
            is_causal=is_causal,
            attn_mask=mask,
            scale=self.scale,
        )
        return out, lse


class _Merged:
    """The attention of rows over what was added so far: `out` [rows, H, D] and its `lse` [rows, H], float32."""

    def __init__(self, query: Tensor) -> None:
        self.out = torch.zeros_like(query)
        self.lse = torch.full(query.shape[:2], float("-inf"))

    def add(self, rows: Tensor | slice, out: Tensor, lse: Tensor) -> None:
        total = torch.logaddexp(self.lse[rows], lse)
        before, now = (self.lse[rows] - total).exp(), (lse - total).exp()
        self.out[rows] = self.out[rows] * before[..., None] + out * now[..., None]
        self.lse[rows] = total


class CpuAttentionBuilder(AttentionBuilder[CpuAttentionMetadata]):
    impl: ClassVar[type[CpuAttentionImpl]] = CpuAttentionImpl

    @classmethod
    def build(
        cls,
        num_heads: int,
        head_size: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        v_head_size: int | None = None,
        alibi: bool = False,
        sliding_window: Any = None,
        logit_softcapping: float | None = None,
        causal: bool = True,
        **_: Any,
    ) -> CpuAttentionImpl:
        if v_head_size not in (None, head_size):
            raise ValueError(f"the CPU attention needs keys and values of one size, not {head_size} and {v_head_size}")
        return cls.impl(
            num_heads,
            head_size,
            scale=scale,
            num_kv_heads=num_kv_heads,
            v_head_size=v_head_size,
            alibi=alibi,
            sliding_window=sliding_window,
            logit_softcapping=logit_softcapping,
            causal=causal,
        )
