"""The KV cache: one flat pool, block after block, so that a block is one contiguous run of bytes.

    block: | keys of all layers | values of all layers | (quantised: key scales | value scales) |

With tensor parallelism a block holds this once per rank, side by side, and each rank sees its own part.

LMDeploy's layers see [num_blocks, block_size, kv_heads, head_dim] views of it. A transfer or the store moves a block
with one copy, and neighbouring blocks with one system call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lmdeploy.pytorch.engine.cache_engine import CacheEngine, StateCacheEngine
from torch import Tensor

from sagellm_common.core import shared_memory
from sagellm_common.core.kv import LayerPart


class CpuCacheEngine(CacheEngine):
    """LMDeploy's CacheEngine over the flat pool. Its constructor is replaced: the original opens CUDA streams."""

    pool: Tensor
    """uint8 [num_blocks, block_bytes]"""
    pool_descriptor: int
    """The pool's file, see `core.shared_memory`"""
    layer_parts: tuple[LayerPart, ...]
    """Where in a block each layer is; empty when several ranks fill it, each in its own time."""

    def __init__(
        self,
        cache_config: Any,
        model_config: Any,
        rank: int = 0,
        tp_rank: int = 0,
        world_size: int = 1,
        cache_stream: Any = None,
        pool_file: int | None = None,
    ) -> None:
        """The pool is in `pool_file`, which the ranks share, or in a file of its own."""
        self.world_size, self.rank, self.tp_rank = world_size, rank, tp_rank
        self.cache_config, self.model_config = cache_config, model_config
        self.block_size = cache_config.block_size
        self.num_layers = model_config.num_layers
        self.kv_cache_dtype = torch.uint8 if cache_config.quant_policy else model_config.dtype
        rank_bytes = self.block_bytes(cache_config, model_config, world_size)
        shape = (self.num_gpu_blocks, world_size * rank_bytes)
        if pool_file is None:
            memory = shared_memory.allocate(math.prod(shape))
        else:
            memory = shared_memory.open_file(pool_file, math.prod(shape))
        self.pool = torch.frombuffer(memory.arena, dtype=torch.uint8).view(shape)
        self.pool_descriptor = memory.descriptor
        self._part = self.pool[:, tp_rank * rank_bytes : (tp_rank + 1) * rank_bytes]
        self.local_gpu_cache = self.allocate_gpu_cache()
        self.local_cpu_cache = self.allocate_cpu_cache()
        self.migration_backend_impl = None
        self.cache_stream = cache_stream
        self.events = None

    @classmethod
    def block_bytes(cls, cache_config: Any, model_config: Any, world_size: int) -> int:
        """Bytes of one rank's part of a block."""
        parts = cls._parts(cache_config, model_config, world_size)
        return int(model_config.num_layers) * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)

    @classmethod
    def _parts(cls, cache_config: Any, model_config: Any, world_size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what one layer keeps of a block on one rank."""
        size, quant = cache_config.block_size, cache_config.quant_policy
        key_dim, value_dim = (
            dim or model_config.head_dim for dim in (model_config.k_head_dim, model_config.v_head_dim)
        )
        keys = cls._get_key_block_shape_impl(model_config, size, key_dim, world_size, quant)
        values = cls._get_value_block_shape_impl(model_config, size, value_dim, world_size, quant)
        dtype = torch.uint8 if quant else model_config.dtype
        scales = [((*shape[:-1], 2), model_config.dtype) for shape in (keys, values)] if quant else []
        return [(keys, dtype), (values, dtype), *scales]

    def allocate_gpu_cache(self) -> list[tuple[Tensor, ...]]:
        views, layer_parts, start = [], [], 0
        for shape, dtype in self._parts(self.cache_config, self.model_config, self.world_size):
            size = self.num_layers * math.prod(shape) * dtype.itemsize
            part = self._part[:, start : start + size].view(dtype).view(self.num_gpu_blocks, self.num_layers, *shape)
            views.append(part.transpose(0, 1))
            layer_parts.append(LayerPart(start, size // self.num_layers))
            start += size
        # Rank 0 knows that a layer is written by itself; that all are done with it only at the end of a forward.
        self.layer_parts = tuple(layer_parts) if self.world_size == 1 else ()
        self.full_gpu_cache = tuple(views)
        return list(zip(*views, strict=True))


class CpuStateCacheEngine(StateCacheEngine):
    @staticmethod
    def allocate_caches(num_caches: int, state_shapes: Any, device: Any) -> Any:
        return StateCacheEngine.allocate_caches(num_caches, state_shapes, "cpu" if device == "cuda" else device)
