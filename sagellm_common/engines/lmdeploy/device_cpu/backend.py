"""The ops backend: attention and sampling are ours, everything else LMDeploy's default torch ops."""

from __future__ import annotations

from typing import Any

import torch
from lmdeploy.pytorch.backends.base import OpType
from lmdeploy.pytorch.backends.default import DefaultOpsBackend
from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingBuilder, MultinomialSamplingImpl
from torch import Tensor

from sagellm_common.engines.lmdeploy.device_cpu.attention import CpuAttentionMetadata
from sagellm_common.engines.lmdeploy.kernels.ops import Batch


class SeededMultinomial(MultinomialSamplingImpl):
    """Draws depend on (seed, position) alone: a resumed sequence samples what the undisturbed one would have."""

    def forward(self, scores: Tensor, seeds: Tensor, offsets: Tensor, indices: Tensor | None = None) -> Tensor:
        rows = []
        for probabilities, seed, offset in zip(scores, seeds.tolist(), offsets.tolist(), strict=True):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + offset) & 0x7FFF_FFFF_FFFF_FFFF)
            rows.append(torch.multinomial(probabilities, 1, generator=generator))
        drawn = torch.stack(rows)
        return (drawn if indices is None else indices.gather(1, drawn)).view(-1)


class SeededMultinomialBuilder(MultinomialSamplingBuilder):
    @staticmethod
    def build() -> SeededMultinomial:
        return SeededMultinomial()


class CpuOpsBackend(DefaultOpsBackend):
    @staticmethod
    def get_name() -> str:
        return "cpu"

    @classmethod
    def get_layer_impl_builder(cls, layer_type: OpType) -> Any:
        if layer_type == OpType.PagedAttention:
            # Not at the top: it builds on this package.
            from sagellm_common.engines.lmdeploy.kernels.prefix_aware_attention import PrefixAwareAttentionBuilder

            return PrefixAwareAttentionBuilder
        if layer_type == OpType.MultinomialSampling:
            return SeededMultinomialBuilder
        return super().get_layer_impl_builder(layer_type)

    @staticmethod
    def get_attention_metadata_cls() -> type[CpuAttentionMetadata]:
        return CpuAttentionMetadata

    @classmethod
    def update_step_context(cls, step_context: Any) -> Any:
        """Called once per step, before the layers run."""
        q, kv = step_context.q_seqlens.long(), step_context.kv_seqlens.long()
        batch = Batch.of(q, kv, step_context.block_offsets)
        step_context.attn_metadata = CpuAttentionMetadata(
            step_context.is_decoding,
            batch.tables,
            q_start_loc=batch.q_starts[:-1],
            q_seqlens=q,
            kv_seqlens=kv,
            quant_policy=step_context.kv_quant_policy,
            batch=batch,
            block_size=step_context.kv_caches[0][0].size(1),
            q_lens=tuple(q.tolist()),
            kv_lens=tuple(kv.tolist()),
        )
        step_context.cross_attn_metadata = None
        return step_context

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def ccl_backend() -> str:
        return "gloo"
