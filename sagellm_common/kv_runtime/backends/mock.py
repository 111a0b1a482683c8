"""A pool in plain memory of this process: for tests and simulations."""

from __future__ import annotations

from collections.abc import Mapping

from sagellm_common.core.clock import Clock, ManualClock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.kv import KvRegion, LayerPart
from sagellm_common.core.types import KvLayout
from sagellm_common.kv_runtime.pool import KVPool


class MockKvPool(KVPool):
    """A `KVPool` of num_blocks blocks. Its clock stands still unless another one is given."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        layer_parts: tuple[LayerPart, ...] = (),
        eviction: str = "lru",
        tenants: Mapping[str, TenantConfig] | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(eviction=eviction, tenants=tenants, clock=clock or ManualClock())
        memory = memoryview(bytearray(num_blocks * layout.block_bytes))
        self.open(layout, KvRegion(memory, layout.block_bytes, num_blocks, layer_parts))

    def regions(self) -> KvRegion:
        assert isinstance(self._memory, KvRegion)
        return self._memory
