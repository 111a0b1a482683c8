"""Paged attention in plain torch: KV is gathered block by block, then scaled_dot_product_attention.

Shapes: T new tokens of a step over all sequences, H heads, D head size, block table [sequences, blocks].
Caches are [num_blocks, block_size, kv_heads, D] (D / 2 packed for int4), scales and zeros [..., 2].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lmdeploy.pytorch.backends.attention import AttentionBuilder, AttentionImpl, AttentionMetadata
from torch import Tensor


@dataclass
class CpuAttentionMetadata(AttentionMetadata):
    """What all layers of one step share, worked out once."""

    q_lens: tuple[int, ...] = ()
    kv_lens: tuple[int, ...] = ()
    token_blocks: Tensor | None = None  # [T] physical block of each new token
    token_slots: Tensor | None = None  # [T] its slot in that block
    decode_mask: Tensor | None = None  # [B, 1, 1, KV] when every sequence has one new token
    decode_padding: Tensor | None = None  # [B, 1, KV - shortest, 1]: what decode_mask hides, from the shortest on
    chunk_masks: tuple[Tensor | None, ...] = ()  # per sequence [q, kv]; None where plain causal does


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


class CpuAttentionImpl(AttentionImpl[CpuAttentionMetadata]):
    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
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
        bits = meta.quant_policy
        if key is not None and value is not None:
            where = (meta.token_blocks, meta.token_slots)
            for new, cache, scales in ((key, k_cache, k_scales_zeros), (value, v_cache, v_scales_zeros)):
                if bits:
                    assert scales is not None
                    codes, scale = quantize(new, bits)
                    cache[where] = codes
                    scales[where] = scale.to(scales.dtype)
                else:
                    cache[where] = new

        def gather(cache: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
            found = cache[blocks]
            return dequantize(found, scales[blocks], bits, query.dtype) if scales is not None and bits else found

        gqa = self.num_heads != self.num_kv_heads
        window = self.sliding_window[0] if self.sliding_window and self.sliding_window[0] > 0 else None
        block_size = k_cache.size(1)
        if meta.decode_mask is not None and meta.decode_padding is not None and window is None:
            blocks = meta.block_offsets[:, : -(-max(meta.kv_lens) // block_size)]
            k, v = (
                gather(c, s, blocks).flatten(1, 2).transpose(1, 2)
                for c, s in ((k_cache, k_scales_zeros), (v_cache, v_scales_zeros))
            )
            for gathered in (k, v):
                # A mask hides no NaN, and slots not written yet hold whatever was there before.
                gathered[:, :, min(meta.kv_lens) :].masked_fill_(meta.decode_padding, 0)
            q = query[:, :, None]  # one new token each: [B, H, 1, D]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=meta.decode_mask, scale=self.scale, enable_gqa=gqa)
            return out.transpose(1, 2).flatten(0, 1)

        outputs, start = [], 0
        for i, (q_len, kv_len) in enumerate(zip(meta.q_lens, meta.kv_lens, strict=True)):
            q = query[start : start + q_len].transpose(0, 1)[None]
            if q_len == kv_len and not bits and key is not None and value is not None:
                # Nothing cached: what was just computed is all there is.
                k, v = key[start : start + q_len], value[start : start + q_len]
            else:
                blocks = meta.block_offsets[i, : -(-kv_len // block_size)]
                k, v = (
                    gather(c, s, blocks).flatten(0, 1)[:kv_len]
                    for c, s in ((k_cache, k_scales_zeros), (v_cache, v_scales_zeros))
                )
            start += q_len
            k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
            chunk_mask = meta.chunk_masks[i]
            if window is not None:
                chunk_mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
                chunk_mask &= ~chunk_mask.tril(kv_len - q_len - window)
            causal = chunk_mask is None and q_len > 1
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=chunk_mask, is_causal=causal, scale=self.scale, enable_gqa=gqa
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs, 0)


class CpuAttentionBuilder(AttentionBuilder[CpuAttentionMetadata]):
    @staticmethod
    def build(
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
        return CpuAttentionImpl(
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
