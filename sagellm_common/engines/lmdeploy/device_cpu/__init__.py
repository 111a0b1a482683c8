"""LMDeploy 0.11.0's PyTorch engine on a plain CPU.

LMDeploy knows no device type `cpu` and has no registry for one. What a plug-in can do without touching its source is
done here by subclassing; a few module globals of LMDeploy are then pointed at the subclasses (`install`). Nothing
outside LMDeploy's modules sees the change.
"""

from typing import Any

from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.engines.lmdeploy.device_cpu.install import CpuEngineConfig, install

__all__ = ["CpuDevice", "CpuEngineConfig", "install"]


class CpuDevice:
    """A `device.Device`; LMDeploy is the CPU's from here on."""

    def __init__(self) -> None:
        install()

    def engine_config(self, **settings: Any) -> CpuEngineConfig:
        return CpuEngineConfig(eager_mode=True, **settings)

    def kv_memory(self, cache_engine: Any) -> KvMemory:
        """In place: the pool is host memory, block after block."""
        num_blocks, block_bytes = cache_engine.pool.shape
        view = memoryview(cache_engine.pool.numpy()).cast("B")
        return KvRegion(view, block_bytes, num_blocks, cache_engine.layer_parts, cache_engine.pool_descriptor)
