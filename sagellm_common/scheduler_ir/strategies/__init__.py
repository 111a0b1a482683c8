"""Placement strategies by name: `make_strategy("fifo")`."""

from __future__ import annotations

from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.strategies import adaptive as _adaptive  # noqa: F401  registers itself
from sagellm_common.scheduler_ir.strategies import aegaeon as _aegaeon  # noqa: F401  registers itself
from sagellm_common.scheduler_ir.strategies import fifo as _fifo  # noqa: F401  registers itself
from sagellm_common.scheduler_ir.strategies import hybrid as _hybrid  # noqa: F401  registers itself
from sagellm_common.scheduler_ir.strategies import priority as _priority  # noqa: F401  registers itself
from sagellm_common.scheduler_ir.strategies import slo_aware as _slo_aware  # noqa: F401  registers itself
from sagellm_common.scheduler_ir.strategies.base import (
    STRATEGIES,
    ModelWork,
    Placement,
    RequestView,
    Strategy,
    WorkerView,
)


def make_strategy(name: str, costs: CostModel | None = None) -> Strategy:
    """`costs` is what it decides by, learned elsewhere while it works. Raises ConfigError listing the known names."""
    return STRATEGIES.get(name)(costs)


__all__ = ["STRATEGIES", "ModelWork", "Placement", "RequestView", "Strategy", "WorkerView", "make_strategy"]
