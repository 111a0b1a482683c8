"""Eviction policies by name: `make_eviction("cost-aware", capacity_blocks)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sagellm_common.core.registry import Registry
from sagellm_common.kv_policy.eviction.adaptive import Adaptive
from sagellm_common.kv_policy.eviction.arc import Arc
from sagellm_common.kv_policy.eviction.base import EvictionPolicy
from sagellm_common.kv_policy.eviction.cost_aware import CostAware
from sagellm_common.kv_policy.eviction.frequency import Gdsf, Lfu
from sagellm_common.kv_policy.eviction.lru import Lru
from sagellm_common.kv_policy.eviction.s3fifo import S3Fifo

EVICTION: Registry[Callable[[int], EvictionPolicy[Any]]] = Registry("eviction policy")
EVICTION.register("adaptive")(Adaptive)
EVICTION.register("arc")(Arc)
EVICTION.register("cost-aware")(CostAware)
EVICTION.register("gdsf")(Gdsf)
EVICTION.register("lfu")(Lfu)
EVICTION.register("lru")(Lru)
EVICTION.register("s3-fifo")(S3Fifo)


def make_eviction(name: str, capacity_blocks: int) -> EvictionPolicy[Any]:
    """For a pool of this many blocks, which holds it to that by calling `evict`.

    Raises ConfigError listing the known names.
    """
    return EVICTION.get(name)(capacity_blocks)


def swap_eviction(old: EvictionPolicy[Any], name: str, capacity_blocks: int) -> EvictionPolicy[Any]:
    """Another policy that holds what `old` holds, in its order. What `old` has learned is lost.

    Raises ConfigError listing the known names.
    """
    new = make_eviction(name, capacity_blocks)
    for block in old:
        new.access([block])
    return new


__all__ = ["EVICTION", "EvictionPolicy", "make_eviction", "swap_eviction"]
