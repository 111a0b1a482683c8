"""SLO × cache × load, all in seconds of the fitted cost model.

    TTFT of a prefill worker   what is queued there + what of the prompt it lacks
    TPOT of a decode worker    its next step with this sequence in it

Among workers that meet the target, the one that has the most of the prompt is taken: compute saved now is room for
those who come later. Where none does, the fastest. Inside the engines those go first of which the most can be in time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, Placement, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load, pick

HEADROOM = 0.7
"""Of a target: predictions are averages, and the queue grows before the request's turn comes."""

PrefillCost = tuple[WorkerView, float, float]
"""(worker, seconds until the first token, of those this request's own)"""
DecodeCost = tuple[WorkerView, float]
"""(worker, seconds of its next step)"""

SHOWN = 4
"""Soonest of the other candidates, for people who ask what else could have been."""


@STRATEGIES.register("hybrid")
class Hybrid:
    name: str = "hybrid"
    order: Order = "on_time"

    def __init__(self, costs: CostModel | None = None) -> None:
        self._costs = costs or CostModel()
        self._separator = PDSeparator()

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        decoders = [worker for worker in workers if worker.decodes]
        if not decoders:
            raise NoWorker("no decode worker is serving; start one or wait until it has joined", retry_after_s=1.0)
        decode = self._decoder(request, decoders)
        prefill, ttft_s, expected_s = None, 0.0, tuple[tuple[str, float], ...]()
        separation = self._separator.decide(request, workers, decode)
        if separation.disaggregate:
            prefillers = [worker for worker in workers if worker.prefills and worker.worker_id != decode.worker_id]
            prefill, expected_s = self._prefiller(request, prefillers)
            ttft_s = expected_s[0][1] if expected_s else 0.0
        stores = [worker for worker in workers if worker.role is WorkerRole.KV_STORE]
        return Placement(
            decode_worker_id=decode.worker_id,
            prefill_worker_id=prefill.worker_id if prefill else None,
            kv_store_worker_id=pick(stores, lambda worker: 0.0).worker_id if stores else None,
            strategy=self.name,
            late=request.waited_s + ttft_s > request.ttft_target_s,
            expected_s=expected_s,
            reason=f"{separation.reason}; decode on {decode.worker_id}: {decode.sequences} sequences, "
            f"{decode.matched_tokens} tokens cached"
            + (
                f"; prefill on {prefill.worker_id}: {prefill.queued_tokens} tokens queued, {prefill.matched_tokens} "
                f"cached"
                if prefill
                else ""
            )
            + (f", first token expected in {1e3 * ttft_s:.0f} ms" if expected_s else ""),
        )

    def _prefiller(
        self, request: RequestView, workers: Sequence[WorkerView]
    ) -> tuple[WorkerView, tuple[tuple[str, float], ...]]:
        """And its `Placement.expected_s`."""
        if not self._costs.prefill.samples:
            worker = pick(workers, lambda worker: affinity_minus_load(request, worker, workers))
            return worker, ()
        step_s, token_s, square_s = self._costs.prefill.coefficients
        prompt = request.num_prompt_tokens

        def seconds(worker: WorkerView) -> tuple[float, float]:
            """(until the first token, of that this request's own)"""
            start = min(worker.matched_tokens, prompt - 1)
            own_s = step_s + token_s * (prompt - start) + square_s * (prompt * prompt - start * start)
            return own_s + token_s * worker.queued_tokens + square_s * worker.queued_squares, own_s

        costs = [(worker, *seconds(worker)) for worker in workers]
        worker, ttft_s, _ = self._best_prefill(request, costs)
        others = heapq.nsmallest(SHOWN, ((cost[1], cost[0].worker_id) for cost in costs if cost[0] is not worker))
        return worker, ((worker.worker_id, ttft_s), *((name, seconds) for seconds, name in others))

    def _decoder(self, request: RequestView, workers: Sequence[WorkerView]) -> WorkerView:
        if not self._costs.decode.samples:
            return pick(workers, lambda worker: affinity_minus_load(request, worker, workers))

        def step_s(worker: WorkerView) -> float:
            context = worker.context_tokens + request.num_prompt_tokens
            return self._costs.decode_s(worker.sequences + 1, context).seconds

        return self._best_decode(request, [(worker, step_s(worker)) for worker in workers])

    def _best_prefill(self, request: RequestView, costs: Sequence[PrefillCost]) -> PrefillCost:
        limit_s = HEADROOM * request.ttft_target_s - request.waited_s
        in_time = [cost for cost in costs if cost[1] <= limit_s]
        if in_time and not math.isinf(limit_s):
            return min(in_time, key=lambda cost: (cost[2], cost[1], cost[0].assigned, cost[0].worker_id))
        return min(costs, key=lambda cost: (cost[1], cost[0].assigned, cost[0].worker_id))

    def _best_decode(self, request: RequestView, costs: Sequence[DecodeCost]) -> WorkerView:
        in_time = [cost for cost in costs if cost[1] <= HEADROOM * request.tpot_target_s]
        if in_time and not math.isinf(request.tpot_target_s):
            # Most of the prompt held there already: the least to move.
            worker, _ = min(in_time, key=lambda cost: (-cost[0].matched_tokens, cost[1], cost[0].worker_id))
        else:
            worker, _ = min(costs, key=lambda cost: (cost[1], cost[0].assigned, cost[0].worker_id))
        return worker
