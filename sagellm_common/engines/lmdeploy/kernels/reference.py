"""The kernels in plain torch, made to be read: the oracle of the tests, and the fallback where nothing was compiled.

Each row is computed on its own or from exact integers, so the promises of `ops.py` hold here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sagellm_common.engines.lmdeploy.kernels.ops import (
    GROUP,
    Batch,
    DecoderLayer,
    DecoderShape,
    KvLayer,
    LayerDone,
    Linear,
    Planes,
)

CODE_MAX = 127
FINE = 256
"""Steps of the second plane in one step of the first."""


def _as_half(x: Tensor) -> Tensor:
    return x.half().float()


def _grouped(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], -1, GROUP)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once, near enough: the product of two float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def quantize_activations(x: Tensor, planes: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K] → codes [planes, T, groups, 32] (integers in float32), scale and scaled sum [T, groups]."""
    groups = _grouped(x)
    largest = groups.abs().amax(-1)
    steps = groups * torch.where(largest > 0, CODE_MAX / largest, 0.0)[..., None]
    high = steps.round()
    scale = largest / CODE_MAX
    if planes == 1:
        return high[None], scale, scale * high.sum(-1)
    low = ((steps - high) * FINE).round().clamp(-CODE_MAX, CODE_MAX)
    return torch.stack([high, low]), scale / FINE, scale / FINE * (high * FINE + low).sum(-1)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """w = scale * codes + minimum, the codes of two planes being high + low / 256. All [rows, groups(, 32)]."""

    bits: int
    codes: tuple[Tensor, ...]
    scale: Tensor
    minimum: Tensor | None


def quantize_weight(weight: Tensor, planes: Planes) -> QuantizedWeight:
    """The smallest format that keeps the weights; see csrc/linear.h."""
    w = _grouped(weight)
    low, high = w.amin(-1), w.amax(-1)
    largest = w.abs().amax(-1)
    exact = torch.zeros_like(low, dtype=torch.bool)
    nibbles, step, minimum = torch.zeros_like(w), torch.zeros_like(low), torch.zeros_like(low)
    for d, m in ((_as_half((high - low) / 15), _as_half(low)), (_as_half(largest / 8), _as_half(-largest))):
        q = torch.where(d[..., None] > 0, ((w - m[..., None]) / d[..., None]).round(), 0.0)
        fits = ((q >= 0) & (q <= 15) & (d[..., None] * q + m[..., None] == w)).all(-1) & ~exact
        nibbles[fits], step[fits], minimum[fits] = q[fits], d[fits], m[fits]
        exact |= fits
    if bool(exact.all()):
        return QuantizedWeight(4, (nibbles,), step, minimum)
    d = _as_half(largest / CODE_MAX)
    codes = _codes(w, d)
    if planes == 1 or bool((d[..., None] * codes == w).all()):
        return QuantizedWeight(8, (codes,), d, None)
    d = largest / CODE_MAX
    codes = _codes(w, d)
    rest = torch.where(d[..., None] > 0, (w - d[..., None] * codes) / d[..., None] * FINE, 0.0)
    return QuantizedWeight(16, (codes, rest.round().clamp(-CODE_MAX, CODE_MAX)), d, None)


def _codes(w: Tensor, d: Tensor) -> Tensor:
    return torch.where(d[..., None] > 0, (w / d[..., None]).round().clamp(-CODE_MAX, CODE_MAX), 0.0)


class ReferenceLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None, planes: Planes) -> None:
        weight = weight.float()
        self._planes = planes
        self._weight = quantize_weight(weight, planes)
        self._bias = torch.zeros(weight.size(0)) if bias is None else bias.float()
        self.bits = self._weight.bits
        self.size_bytes = sum(t.numel() * t.element_size() for t in (*self._weight.codes, self._weight.scale))

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale, scaled_sum = quantize_activations(x.float(), self._planes)
        weight = self._weight
        total = self._bias.expand(x.size(0), -1)
        for g in range(scale.size(1)):
            w = [plane[:, g].T for plane in weight.codes]
            # Products of integers this small add up exactly in float32, in whatever order.
            dot = codes[0, :, g] @ w[0]
            if self._planes == 2:
                dot = dot.double() * FINE + (codes[1, :, g] @ w[0]).double()
                if weight.bits == 16:
                    dot += (codes[0, :, g] @ w[1]).double()
                dot = dot.float()
            total = _fma(dot, weight.scale[:, g] * scale[:, g, None], total)
            if weight.minimum is not None:
                total = _fma(weight.minimum[:, g].expand_as(total), scaled_sum[:, g, None], total)
        return total


class ReferenceDecoder:
    def __init__(
        self,
        ops: ReferenceOps,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        cosines: Tensor,
        sines: Tensor,
    ) -> None:
        self._ops, self._shape, self._layers = ops, shape, layers
        self._final_norm, self._cosines, self._sines = final_norm, cosines, sines

    def __call__(
        self, hidden: Tensor, caches: Sequence[KvLayer], batch: Batch, layer_done: LayerDone | None = None
    ) -> Tensor:
        shape, tokens = self._shape, hidden.size(0)
        widths = [shape.heads, shape.kv_heads, shape.kv_heads]
        positions = torch.cat([torch.arange(end - count, end) for _, count, end in _sequences(batch)])
        cos, sin = self._cosines[positions][:, None], self._sines[positions][:, None]
        x = hidden
        for i, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            qkv = layer.qkv(self._normalised(x, layer.attention_norm)).view(tokens, -1, shape.head_dim)
            query, key, value = torch.split(qkv, widths, dim=1)
            query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
            attended = self._ops.paged_attention(query, key, value, cache, batch, shape.head_dim**-0.5)
            if layer_done is not None:
                layer_done(i)
            x = x + layer.output(attended.flatten(1))
            gate, up = layer.gate_up(self._normalised(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(gate / (1 + torch.exp(-gate)) * up)
        return hidden.copy_(self._normalised(x, self._final_norm))

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        # Row by row: torch may add the squares of a batch in another order than those of one row.
        squares = torch.stack([row.square().sum() for row in x])[:, None]
        return x * torch.rsqrt(squares / self._shape.hidden + self._shape.norm_eps) * weight


class ReferenceOps:
    name = "torch"

    def paged_attention(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, cache: KvLayer, batch: Batch, scale: float
    ) -> Tensor:
        keys, values = cache[0], cache[1]
        block_tokens, group = keys.size(1), query.size(1) // keys.size(2)
        rows = []
        for s, (start, count, end) in enumerate(_sequences(batch)):
            positions = torch.arange(end)
            slots = batch.tables[s, positions // block_tokens], positions % block_tokens
            new = slots[0][end - count :], slots[1][end - count :]
            if key is not None and value is not None:
                keys[new] = key[start : start + count].to(keys.dtype)
                values[new] = value[start : start + count].to(values.dtype)
            known_keys = keys[slots].double().repeat_interleave(group, dim=1)  # [end, heads, D]
            known_values = values[slots].double().repeat_interleave(group, dim=1)
            for i in range(count):
                visible = end - count + i + 1
                scores = (known_keys[:visible] * query[start + i].double() * scale).sum(-1)  # [visible, heads]
                rows.append((scores.softmax(0)[..., None] * known_values[:visible]).sum(0).float())
        return torch.stack(rows)

    def linear(self, weight: Tensor, bias: Tensor | None, planes: Planes) -> Linear:
        return ReferenceLinear(weight, bias, planes)

    def decoder(
        self, shape: DecoderShape, layers: Sequence[DecoderLayer], final_norm: Tensor, cosines: Tensor, sines: Tensor
    ) -> ReferenceDecoder:
        return ReferenceDecoder(self, shape, layers, final_norm, cosines, sines)


def _sequences(batch: Batch) -> list[tuple[int, int, int]]:
    """Per sequence: its first new token, how many there are, and the position after the last."""
    starts = batch.q_starts.tolist()
    return [(a, b - a, end) for a, b, end in zip(starts, starts[1:], batch.kv_lens.tolist(), strict=False)]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
