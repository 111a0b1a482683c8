"""What the CPU kernels compute. `native.py` and `reference.py` implement it, tests/contract checks both.

Promises: a row (one token of one sequence) has the same bits whatever else is in the batch, however its prompt was cut
into steps, and with any number of threads. Slots that were never written may hold anything, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Planes = Literal[1, 2]
"""Activations as one int8 (relative error 2^-8 of the largest of 32), or as two (2^-17)."""

GROUP = 32
"""Inputs of a linear layer that share a scale: its width is a multiple of this."""

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)

KvLayer = Sequence[Tensor]
"""Keys and values of one layer, each [blocks, block_tokens, kv_heads, head_dim] with any stride between blocks."""


LayerDone = Callable[[int], None]
"""Must not raise: C++ is between it and whoever would catch it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The new tokens of a step, sequence after sequence; int64 on the CPU, contiguous."""

    q_starts: Tensor  # [sequences + 1]: sequence s has the tokens q_starts[s] to q_starts[s + 1]
    kv_lens: Tensor  # [sequences]: tokens known to each after this step
    tables: Tensor  # [sequences, blocks]

    @classmethod
    def of(cls, q_lens: Tensor, kv_lens: Tensor, tables: Tensor) -> Batch:
        starts = torch.zeros(q_lens.numel() + 1, dtype=torch.int64)
        torch.cumsum(q_lens, 0, out=starts[1:])
        return cls(starts, kv_lens.long().contiguous(), tables.long().contiguous())

    @property
    def num_tokens(self) -> int:
        return int(self.q_starts[-1])


@dataclass(frozen=True, slots=True)
class DecoderShape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    planes: Planes

    def problem(self) -> str | None:
        """Why no decoder can have this shape; None if one can."""
        for name, width in (("hidden_size", self.hidden), ("intermediate_size", self.intermediate)):
            if width % GROUP:
                return f"{name} {width} is no multiple of {GROUP}"
        if self.head_dim not in HEAD_DIMS:
            return f"head_dim {self.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
        if self.heads * self.head_dim % GROUP:
            return f"{self.heads} heads of {self.head_dim} make no multiple of {GROUP}"
        return None


class Linear(Protocol):
    """y = x W^T + b with W in int8 groups. `bits` per weight: 4 or 8 hold it exactly or as well as 8 can, 16 almost."""

    @property
    def bits(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, columns] float32 → [tokens, rows] float32."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer. Norms are float32 [hidden]; qkv and gate_up have their parts stacked along the rows."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder(Protocol):
    def __call__(
        self, hidden: Tensor, caches: Sequence[KvLayer], batch: Batch, layer_done: LayerDone | None = None
    ) -> Tensor:
        """Embeddings [tokens, hidden] float32 → normalised hidden states; overwrites its input, writes KV to `caches`.

        `layer_done` is called with each layer in order, on the calling thread, once its KV is complete.
        """


class CpuOps(Protocol):
    @property
    def name(self) -> str:
        """What computes: "avx512_vnni", "avx2" or "torch"."""

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        cache: KvLayer,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        """query [T, heads, D], key and value [T, kv_heads, D] → [T, heads, D], float32.

        Writes key and value into their slots first (None: they are there), then attends causally over block tables.
        The cache is float32, float16 or bfloat16.
        """

    def linear(self, weight: Tensor, bias: Tensor | None, planes: Planes) -> Linear:
        """Quantises weight [rows, columns]. With two planes, weights get a second one where int8 is not exact."""

    def decoder(
        self, shape: DecoderShape, layers: Sequence[DecoderLayer], final_norm: Tensor, cosines: Tensor, sines: Tensor
    ) -> Decoder:
        """cosines and sines: [positions, head_dim / 2]. All tensors float32; they are kept."""
