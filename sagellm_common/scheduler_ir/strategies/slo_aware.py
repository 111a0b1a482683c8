"""Earliest feasible deadline first, each request where its first token is expected soonest.

Blind to what a choice costs those who come later, which `hybrid` is not: a prefix counts for the time it saves now.
"""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.hybrid import DecodeCost, Hybrid, PrefillCost
from sagellm_common.scheduler_ir.strategies.scoring import pick, promptness


@STRATEGIES.register("slo_aware")
class SloAware(Hybrid):
    name = "slo_aware"
    order: Order = "feasible"
    fair = False

    def _best_prefill(self, request: RequestView, costs: Sequence[PrefillCost]) -> PrefillCost:
        def score(cost: PrefillCost) -> float:
            return promptness(cost.ttft_s, request.ttft_target_s)

        return min(costs, key=lambda cost: (-score(cost), cost.worker.assigned, cost.worker.worker_id))

    def _best_decode(self, request: RequestView, costs: Sequence[DecodeCost]) -> WorkerView:
        steps_s = {worker.worker_id: step_s for worker, step_s in costs}
        workers = [worker for worker, _ in costs]
        return pick(workers, lambda worker: promptness(steps_s[worker.worker_id], request.tpot_target_s))
