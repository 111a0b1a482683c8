"""Placement rules of other routers, written anew from what they publish, to compare with.

round-robin    next in turn
least-loaded   fewest requests outstanding
dynamo-kv      least of overlap_weight · blocks to prefill + blocks that decode there   (NVIDIA Dynamo's KV router)
sglang-cache   the longest match if it is long enough, else the least used cache; the shortest queue when the load is
               out of balance                                                          (SGLang's cache-aware router)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.strategies import Placement, RequestView, WorkerView

BLOCK_TOKENS = 16
OVERLAP_WEIGHT = 1.0
CACHE_THRESHOLD = 0.5
BALANCE_ABS, BALANCE_REL = 32, 1.0001

Pick = Callable[[RequestView, Sequence[WorkerView]], WorkerView]


class Peer:
    """One rule for both pools, as those routers have it; inside the engines, first come, first served."""

    order: Order = "fifo"
    fair = False

    def __init__(self, name: str, pick: Pick) -> None:
        self.name = name
        self._pick = pick

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        prefillers = [worker for worker in workers if worker.prefills]
        decode = self._pick(request, [worker for worker in workers if worker.decodes])
        prefill = self._pick(request, prefillers) if prefillers else None
        return Placement(decode.worker_id, prefill.worker_id if prefill else None, strategy=self.name)


def _round_robin() -> Pick:
    turns: dict[bool, itertools.count[int]] = {True: itertools.count(), False: itertools.count()}

    def pick(request: RequestView, workers: Sequence[WorkerView]) -> WorkerView:
        in_turn = sorted(workers, key=lambda worker: worker.worker_id)
        return in_turn[next(turns[workers[0].prefills]) % len(workers)]

    return pick


def _least_loaded(request: RequestView, workers: Sequence[WorkerView]) -> WorkerView:
    return min(workers, key=lambda worker: (worker.outstanding, worker.assigned, worker.worker_id))


def _dynamo(request: RequestView, workers: Sequence[WorkerView]) -> WorkerView:
    def cost(worker: WorkerView) -> float:
        new_tokens = request.num_prompt_tokens - min(worker.matched_tokens, request.num_prompt_tokens)
        prefill_blocks = (worker.queued_tokens + new_tokens) / BLOCK_TOKENS
        return OVERLAP_WEIGHT * prefill_blocks + (worker.context_tokens + request.num_prompt_tokens) / BLOCK_TOKENS

    return min(workers, key=lambda worker: (cost(worker), worker.assigned, worker.worker_id))


def _sglang() -> Pick:
    cached: dict[str, int] = {}
    """Tokens ever routed to each worker: what the router's own tree takes for the size of its cache."""

    def pick(request: RequestView, workers: Sequence[WorkerView]) -> WorkerView:
        loads = [worker.outstanding for worker in workers]
        best = max(workers, key=lambda worker: (worker.matched_tokens, worker.worker_id))
        if max(loads) - min(loads) > BALANCE_ABS and max(loads) > BALANCE_REL * min(loads):
            chosen = _least_loaded(request, workers)
        elif best.matched_tokens > CACHE_THRESHOLD * request.num_prompt_tokens:
            chosen = best
        else:
            chosen = min(workers, key=lambda worker: (cached.get(worker.worker_id, 0), worker.worker_id))
        added = request.num_prompt_tokens - min(chosen.matched_tokens, request.num_prompt_tokens)
        cached[chosen.worker_id] = cached.get(chosen.worker_id, 0) + added
        return chosen

    return pick


PEERS: dict[str, Callable[[CostModel], Peer]] = {
    "round-robin": lambda costs: Peer("round-robin", _round_robin()),
    "least-loaded": lambda costs: Peer("least-loaded", _least_loaded),
    "dynamo-kv": lambda costs: Peer("dynamo-kv", _dynamo),
    "sglang-cache": lambda costs: Peer("sglang-cache", _sglang()),
}
