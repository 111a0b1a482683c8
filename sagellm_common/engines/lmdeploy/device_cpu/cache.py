"""The KV cache: one flat pool, block after block, so that a block is one contiguous run of bytes.

    block: | keys of all layers | values of all layers | (quantised: key scales | value scales) |

LMDeploy's layers see [num_blocks, block_size, kv_heads, head_dim] views of it. A transfer or the store moves a block
with one copy, and neighbouring blocks with one system call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lmdeploy.pytorch.engine.cache_engine import CacheEngine, StateCacheEngine
from torch import Tensor


class CpuCacheEngine(CacheEngine):
    """LMDeploy's CacheEngine over the flat pool. Its constructor is replaced: the original opens CUDA streams."""

    pool: Tensor
    """uint8 [num_blocks, block_bytes]"""

    def __init__(
        self,
        cache_config: Any,
        model_config: Any,
        rank: int = 0,
        tp_rank: int = 0,
        world_size: int = 1,
        cache_stream: Any = None,
    ) -> None:
        self.world_size, self.rank, self.tp_rank = world_size, rank, tp_rank
        self.cache_config, self.model_config = cache_config, model_config
        self.block_size = cache_config.block_size
        self.num_layers = model_config.num_layers
        self.kv_cache_dtype = torch.uint8 if cache_config.quant_policy else model_config.dtype
        self.local_gpu_cache = self.allocate_gpu_cache()
        self.local_cpu_cache = self.allocate_cpu_cache()
        self.migration_backend_impl = None
        self.cache_stream = cache_stream
        self.events = None

    def allocate_gpu_cache(self) -> list[tuple[Tensor, ...]]:
        keys, values = self.get_key_block_shape(local=True), self.get_value_block_shape(local=True)
        parts = [(keys, self.kv_cache_dtype), (values, self.kv_cache_dtype)]
        if self.cache_config.quant_policy:
            scales = self.model_config.dtype
            parts += [((*keys[:-1], 2), scales), ((*values[:-1], 2), scales)]
        sizes = [self.num_layers * math.prod(shape) * dtype.itemsize for shape, dtype in parts]
        self.pool = torch.zeros(self.num_gpu_blocks, sum(sizes), dtype=torch.uint8)
        views, start = [], 0
        for (shape, dtype), size in zip(parts, sizes, strict=True):
            part = self.pool[:, start : start + size].view(dtype).view(self.num_gpu_blocks, self.num_layers, *shape)
            views.append(part.transpose(0, 1))
            start += size
        self.full_gpu_cache = tuple(views)
        return list(zip(*views, strict=True))


class CpuStateCacheEngine(StateCacheEngine):
    @staticmethod
    def allocate_caches(num_caches: int, state_shapes: Any, device: Any) -> Any:
        return StateCacheEngine.allocate_caches(num_caches, state_shapes, "cpu" if device == "cuda" else device)
