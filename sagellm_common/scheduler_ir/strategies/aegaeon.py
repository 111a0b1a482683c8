"""Many models on few workers, scheduled by the token (Xiang et al., SOSP'25, "Aegaeon").

prefill   requests of one model form groups of at most MAX_GROUP: a worker switches models between groups only. Who
          comes joins a group of its model that has room; else it begins one where the least is queued
decode    the batches of a worker, one per model, take turns. A turn's quota follows from the target of the later
          tokens: what a batch makes ahead in its own turn lasts its readers while the others have theirs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, ModelWork, Placement, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load, pick

MAX_GROUP = 8
"""Larger groups switch less often, and let other models wait longer; the paper's choice."""
MAX_QUOTA_S = 4.0
"""No turn is longer: a reader of another model waits no longer than a round of such."""
MIN_ROUND = 0.5
"""A round's share of the time that its tokens last its readers, at least: with little to do, turns are short."""


@STRATEGIES.register("aegaeon")
class Aegaeon:
    name: str = "aegaeon"
    order: Order = "fifo"
    fair = True

    def __init__(self, costs: CostModel | None = None) -> None:
        self._costs = costs or CostModel()
        self._separator = PDSeparator()

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        able = [worker for worker in workers if not worker.hosts or request.model in worker.hosts]
        decoders = [worker for worker in able if worker.decodes]
        if not decoders:
            model = f" model {request.model!r}" if any(worker.decodes for worker in workers) else ""
            raise NoWorker(
                f"no decode worker is serving{model}; start one or wait until it has joined", retry_after_s=1.0
            )
        decode = pick(decoders, lambda worker: self._decode_score(request, worker, decoders))
        prefill = None
        separation = self._separator.decide(request, able, decode)
        if separation.disaggregate:
            prefillers = [worker for worker in able if worker.prefills and worker.worker_id != decode.worker_id]
            prefill = pick(prefillers, lambda worker: self._prefill_score(request, worker, prefillers))
        chosen = [worker for worker in (prefill, decode) if worker is not None]
        stores = [worker for worker in workers if worker.role is WorkerRole.KV_STORE]
        return Placement(
            decode_worker_id=decode.worker_id,
            prefill_worker_id=prefill.worker_id if prefill else None,
            kv_store_worker_id=pick(stores, lambda worker: 0.0).worker_id if stores else None,
            strategy=self.name,
            switch_worker_ids=tuple(worker.worker_id for worker in chosen if _switches(request, worker)),
            reason="; ".join([separation.reason, *(_why(request, worker) for worker in chosen)]),
        )

    def _prefill_score(self, request: RequestView, worker: WorkerView, peers: Sequence[WorkerView]) -> float:
        """In the upper half where a group of its model has room: one switch less."""
        joins = any(group.model == request.model and group.requests < MAX_GROUP for group in worker.queue)
        if not self._costs.prefill.samples:
            return (joins + affinity_minus_load(request, worker, peers)) / 2
        _, token_s, square_s = self._costs.prefill.coefficients
        models = [worker.model, *(group.model for group in worker.queue), *([] if joins else [request.model])]
        switches = sum(before != after for before, after in pairwise(models))
        queued_s = token_s * worker.queued_tokens + square_s * worker.queued_squares
        return (joins + 1 / (1 + queued_s + switches * self._costs.switch_s().seconds)) / 2

    def _decode_score(self, request: RequestView, worker: WorkerView, peers: Sequence[WorkerView]) -> float:
        """In the upper half where a batch of its model runs already, and can take it within the target."""
        if not self._costs.decode.samples or math.isinf(request.tpot_target_s):
            return affinity_minus_load(request, worker, peers)
        batches = {batch.model: batch for batch in worker.batches}
        joins = batches.get(request.model, ModelWork(request.model))
        context = joins.tokens + request.num_prompt_tokens
        batches[request.model] = ModelWork(request.model, joins.requests + 1, context)
        steps_s = [self._costs.decode_mean_s(batch.requests, batch.tokens) for batch in batches.values()]
        share = round_share(steps_s, request.tpot_target_s, self._costs.switch_s().seconds)
        return ((joins.requests > 0 and share <= 1) + 1 / (1 + share)) / 2


def round_share(steps_s: Sequence[float], target_s: float, switch_s: float) -> float:
    """α: a round's duration in terms of how long its tokens last at one per `target_s`; above 1 some come late.

    `steps_s` are what one step of each batch takes. Every turn begins with a switch.
    """
    if len(steps_s) < 2:
        return sum(steps_s) / target_s
    busy = sum(steps_s) / target_s
    # Of the batch with the fewest tokens per turn and target the quota is the longest one.
    return max(len(steps_s) * switch_s * max(steps_s) / target_s / MAX_QUOTA_S + busy, MIN_ROUND)


def decode_quotas(steps_s: Sequence[float], target_s: float, switch_s: float) -> list[float]:
    """Seconds of each batch's turn in a round: qᵢ = c / (nᵢ·(α − Σ 1/nₖ)), nᵢ the steps of batch i per `target_s` and
    c the switching of a whole round. At least one step, at most MAX_QUOTA_S. Raises ValueError for costs below 0.
    """
    if min([*steps_s, switch_s]) < 0 or target_s <= 0:
        raise ValueError(f"steps of {list(steps_s)} s, switches of {switch_s} s, a target of {target_s} s")
    if len(steps_s) < 2:
        return [MAX_QUOTA_S] * len(steps_s)
    spare = round_share(steps_s, target_s, switch_s) - sum(steps_s) / target_s
    switching_s = len(steps_s) * switch_s
    quotas = [switching_s * step_s / target_s / spare if spare > 0 else 0.0 for step_s in steps_s]
    return [min(max(quota, step_s), max(MAX_QUOTA_S, step_s)) for quota, step_s in zip(quotas, steps_s, strict=True)]


def _switches(request: RequestView, worker: WorkerView) -> bool:
    """Whether it has to load the request's model first, as far as is known."""
    last = worker.queue[-1].model if worker.queue else worker.model
    return bool(worker.hosts) and last != request.model


def _why(request: RequestView, worker: WorkerView) -> str:
    part = "decode" if worker.decodes else "prefill"
    models = f", {len(worker.hosts)} models hosted, {worker.model or 'none'} loaded" if worker.hosts else ""
    return f"{part} on {worker.worker_id}: {worker.queued_tokens} tokens queued, {worker.sequences} sequences{models}"
