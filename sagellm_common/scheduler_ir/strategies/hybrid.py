"""SLO × cache × load, all in seconds of the fitted cost model.

    TTFT of a prefill worker   what is queued there + what of the prompt it lacks
    TTFT of a decode worker    the same, a chunk with each of its steps, as many tokens as keep these within the target
    TPOT of a decode worker    its next step with this sequence in it

Among those that meet the target, who has the most of the prompt is taken, unless it comes noticeably sooner elsewhere:
compute saved now is room for those who come later. Where none does, the soonest. Decode workers compute prompts in
between, so that all of the cluster bears a rush. Of who waits, those go first of whom the most can be in time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, Placement, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load, pick, prefix_affinity, promptness

HEADROOM = 0.7
"""Of a target: predictions are averages, and the queue grows before the request's turn comes."""
STEP_HEADROOM = 0.95
"""Of the target of the later tokens: so long a decode step with a chunk of a prompt in it may last."""
MIN_CHUNK_TOKENS = 32
"""Smaller chunks cost more in steps than they compute."""
WAIT_WEIGHT = 0.1
"""A second less to wait is worth so many of compute: a long queue is left to those who find their prefix there."""

TIE = 1e-3
"""Weight of what decides between workers that are as good in all else."""

DecodeCost = tuple[WorkerView, float]
"""(worker, seconds of its next step)"""

SHOWN = 4
"""Soonest of the other candidates, for people who ask what else could have been."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Where the prompt could be computed: `ttft_s` until the first token. `own_s` is what that costs the cluster.

    With `chunk_tokens`, by the worker that decodes it, so many tokens with each of its steps.
    """

    worker: WorkerView
    ttft_s: float
    own_s: float
    chunk_tokens: int = 0


@STRATEGIES.register("hybrid")
class Hybrid:
    name: str = "hybrid"
    order: Order = "on_time"
    fair = True

    def __init__(self, costs: CostModel | None = None) -> None:
        self._costs = costs or CostModel()
        self._separator = PDSeparator()

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        decoders = [worker for worker in workers if worker.decodes]
        if not decoders:
            raise NoWorker("no decode worker is serving; start one or wait until it has joined", retry_after_s=1.0)
        decode = self._decoder(request, decoders)
        prefill, cost, expected_s = None, None, tuple[tuple[str, float], ...]()
        separation = self._separator.decide(request, workers, decode)
        prefillers = [worker for worker in workers if worker.prefills and worker.worker_id != decode.worker_id]
        if separation.disaggregate and not self._costs.prefill.samples:
            prefill = pick(prefillers, lambda worker: affinity_minus_load(request, worker, prefillers))
        elif separation.disaggregate or not prefillers:  # there is a prompt to compute, somewhere
            costs = [*self._elsewhere(request, prefillers), *self._in_between(request, decoders)]
            if costs:
                cost = self._best_prefill(request, costs)
                expected_s = _shown(cost, costs)
                if cost.chunk_tokens:
                    decode = cost.worker
                else:
                    prefill = cost.worker
        stores = [worker for worker in workers if worker.role is WorkerRole.KV_STORE]
        return Placement(
            decode_worker_id=decode.worker_id,
            prefill_worker_id=prefill.worker_id if prefill else None,
            kv_store_worker_id=pick(stores, lambda worker: 0.0).worker_id if stores else None,
            strategy=self.name,
            late=cost is not None and request.waited_s + cost.ttft_s > request.ttft_target_s,
            expected_s=expected_s,
            chunk_tokens=cost.chunk_tokens if cost else 0,
            reason=f"{separation.reason}; decode on {decode.worker_id}: {decode.sequences} sequences, "
            f"{decode.matched_tokens} tokens cached"
            + (
                f"; prefill on {prefill.worker_id}: {prefill.queued_tokens} tokens queued, {prefill.matched_tokens} "
                f"cached"
                if prefill
                else ""
            )
            + (f", first token expected in {1e3 * cost.ttft_s:.0f} ms" if cost else ""),
        )

    def _elsewhere(self, request: RequestView, workers: Sequence[WorkerView]) -> list[PrefillCost]:
        """On workers that prefill."""
        step_s, token_s, square_s = self._costs.prefill.coefficients
        prompt = request.num_prompt_tokens

        def cost(worker: WorkerView) -> PrefillCost:
            start = min(worker.matched_tokens, prompt - 1)
            own_s = step_s + token_s * (prompt - start) + square_s * (prompt * prompt - start * start)
            return PrefillCost(worker, own_s + token_s * worker.queued_tokens + square_s * worker.queued_squares, own_s)

        return [cost(worker) for worker in workers]

    def _in_between(self, request: RequestView, workers: Sequence[WorkerView]) -> list[PrefillCost]:
        """On workers that decode, a chunk with each step, where these leave room within the target."""
        known = self._costs.prefill.samples and self._costs.decode.samples
        if math.isinf(request.tpot_target_s) or not known:
            return []
        step_s, token_s, square_s = self._costs.prefill.coefficients
        prompt = request.num_prompt_tokens
        mixed_s = STEP_HEADROOM * request.tpot_target_s
        found = []
        for worker in workers:
            start = min(worker.matched_tokens, prompt - 1)
            own_s = step_s + token_s * (prompt - start) + square_s * (prompt * prompt - start * start)
            all_s = own_s + token_s * worker.queued_tokens + square_s * worker.queued_squares
            room_s = mixed_s - step_s - self._costs.decode_mean_s(worker.sequences + 1, worker.context_tokens)
            rest, last_s = prompt - start, token_s + 2 * square_s * prompt  # the last token costs the most
            if room_s <= 0:
                continue
            chunk_tokens = rest if last_s * rest <= room_s else int(room_s / last_s)
            if chunk_tokens < min(MIN_CHUNK_TOKENS, rest):
                continue
            busy = 1 - room_s / mixed_s
            own_s *= 1 + busy**4  # who decodes there is held up, and the more the less they can spare
            ttft_s = all_s if not worker.sequences else all_s * mixed_s / room_s
            found.append(PrefillCost(worker, ttft_s, own_s, chunk_tokens))
        return found

    def _decoder(self, request: RequestView, workers: Sequence[WorkerView]) -> WorkerView:
        if not self._costs.decode.samples:
            return pick(workers, lambda worker: affinity_minus_load(request, worker, workers))

        def step_s(worker: WorkerView) -> float:
            context = worker.context_tokens + request.num_prompt_tokens
            return self._costs.decode_mean_s(worker.sequences + 1, context)

        return self._best_decode(request, [(worker, step_s(worker)) for worker in workers])

    def _best_prefill(self, request: RequestView, costs: Sequence[PrefillCost]) -> PrefillCost:
        limit_s = HEADROOM * request.ttft_target_s - request.waited_s

        def score(cost: PrefillCost) -> float:
            if math.isfinite(limit_s) and cost.ttft_s <= limit_s:
                return (1 + promptness(cost.own_s + WAIT_WEIGHT * cost.ttft_s, request.ttft_target_s)) / 2
            return promptness(cost.ttft_s, request.ttft_target_s) / 2

        return min(costs, key=lambda cost: (-score(cost), cost.worker.assigned, cost.worker.worker_id))

    def _best_decode(self, request: RequestView, costs: Sequence[DecodeCost]) -> WorkerView:
        limit_s = HEADROOM * request.tpot_target_s
        steps_s = {worker.worker_id: step_s for worker, step_s in costs}

        def score(worker: WorkerView) -> float:
            """Of those that keep the pace, the one with most of the prompt: the least to move."""
            step_s = steps_s[worker.worker_id]
            pace = promptness(step_s, request.tpot_target_s)
            if math.isfinite(limit_s) and step_s <= limit_s:
                return (1 + (1 - TIE) * prefix_affinity(request, worker) + TIE * pace) / 2
            return pace / 2

        return pick([worker for worker, _ in costs], score)


def _shown(chosen: PrefillCost, costs: Sequence[PrefillCost]) -> tuple[tuple[str, float], ...]:
    """As `Placement.expected_s`."""
    others = ((cost.ttft_s, cost.worker.worker_id) for cost in costs if cost is not chosen)
    return (
        (chosen.worker.worker_id, chosen.ttft_s),
        *((name, seconds) for seconds, name in heapq.nsmallest(SHOWN, others)),
    )
