"""Earliest feasible deadline first, each request where its first token is expected soonest.

Blind to what a choice costs those who come later, which `hybrid` is not: a prefix counts for the time it saves now.
"""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.hybrid import DecodeCost, Hybrid, PrefillCost


@STRATEGIES.register("slo_aware")
class SloAware(Hybrid):
    name = "slo_aware"
    order: Order = "feasible"

    def _best_prefill(self, request: RequestView, costs: Sequence[PrefillCost]) -> PrefillCost:
        return min(costs, key=lambda cost: (cost[1], cost[0].assigned, cost[0].worker_id))

    def _best_decode(self, request: RequestView, costs: Sequence[DecodeCost]) -> WorkerView:
        worker, _ = min(costs, key=lambda cost: (cost[1], cost[0].assigned, cost[0].worker_id))
        return worker
