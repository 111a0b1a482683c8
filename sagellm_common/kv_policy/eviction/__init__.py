"""Eviction policies by name: `make_eviction("cost-aware", capacity_blocks)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sagellm_common.core.registry import Registry
from sagellm_common.kv_policy.eviction.adaptive import Adaptive
from sagellm_common.kv_policy.eviction.arc import Arc
from sagellm_common.kv_policy.eviction.base import Cost, EvictionPolicy, K, uniform
from sagellm_common.kv_policy.eviction.cost_aware import CostAware
from sagellm_common.kv_policy.eviction.frequency import Gdsf, Lfu
from sagellm_common.kv_policy.eviction.lru import Lru
from sagellm_common.kv_policy.eviction.s3fifo import S3Fifo

EVICTION: Registry[Callable[..., EvictionPolicy[Any]]] = Registry("eviction policy")
EVICTION.register("adaptive")(Adaptive)
EVICTION.register("arc")(Arc)
EVICTION.register("cost-aware")(CostAware)
EVICTION.register("gdsf")(Gdsf)
EVICTION.register("lfu")(Lfu)
EVICTION.register("lru")(Lru)
EVICTION.register("s3-fifo")(S3Fifo)


MINDING_COST = ("adaptive", "cost-aware", "gdsf")


def make_eviction(name: str, capacity_blocks: int, cost: Cost | None = None) -> EvictionPolicy[Any]:
    """For a pool of this many blocks, which holds it to that by calling `evict`. `cost` is for those that mind it.

    Raises ConfigError listing the known names.
    """
    make = EVICTION.get(name)
    return make(capacity_blocks, cost) if cost and name in MINDING_COST else make(capacity_blocks)


def swap_eviction(
    old: EvictionPolicy[K],
    name: str,
    capacity_blocks: int,
    cost: Cost | None = None,
    depth_of: Callable[[K], int] = lambda block: 0,
) -> EvictionPolicy[K]:
    """Another policy that holds what `old` holds, in its order. What `old` has learned is lost.

    Raises ConfigError listing the known names.
    """
    new: EvictionPolicy[K] = make_eviction(name, capacity_blocks, cost)
    for block in old:
        new.access([block], depth_of(block))
    return new


__all__ = ["EVICTION", "Cost", "EvictionPolicy", "make_eviction", "swap_eviction", "uniform"]
