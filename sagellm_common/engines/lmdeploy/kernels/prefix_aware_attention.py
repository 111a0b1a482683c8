"""The attention of LMDeploy's layers: new tokens over a cached prefix and themselves, straight from the block table.

Compiled where that is possible. Torch, which gathers the blocks first, does the rest: no compiled kernels, KV that is
quantised, another dtype than float32.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sagellm_common.engines.lmdeploy.device_cpu.attention import (
    CpuAttentionBuilder,
    CpuAttentionImpl,
    CpuAttentionMetadata,
)
from sagellm_common.engines.lmdeploy.kernels.native import native_ops
from sagellm_common.engines.lmdeploy.kernels.ops import HEAD_DIMS


class PrefixAwareAttention(CpuAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        window = self.sliding_window[0] if isinstance(self.sliding_window, (tuple, list)) else self.sliding_window
        plain = not self.alibi and not self.logit_softcapping and (window or -1) < 0
        self._ops = native_ops() if self.head_size in HEAD_DIMS and plain else None

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
        """See CpuAttentionImpl."""
        meta = attn_metadata
        served = not meta.quant_policy and query.dtype == k_cache.dtype == torch.float32 and learnable_sink is None
        if self._ops is None or meta.batch is None or not served:
            return super().forward(
                query, key, value, k_cache, v_cache, meta, k_scales_zeros, v_scales_zeros, learnable_sink, inplace
            )
        return self._ops.paged_attention(query, key, value, (k_cache, v_cache), meta.batch, self.scale)


class PrefixAwareAttentionBuilder(CpuAttentionBuilder):
    impl: ClassVar[type[CpuAttentionImpl]] = PrefixAwareAttention
