"""First come, first served: each request goes at once to the worker with the best prefix affinity − load.

Of decode workers that are equal in that, the one with the cheaper link from the prefill worker, as far as is known.
"""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, Placement, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load, pick


@STRATEGIES.register("fifo")
class Fifo:
    name: str = "fifo"
    order: Order = "fifo"
    fair = False

    def __init__(self, costs: CostModel | None = None) -> None:
        self._separator = PDSeparator()

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        decoders = [worker for worker in workers if worker.decodes]
        if not decoders:
            raise NoWorker("no decode worker is serving; start one or wait until it has joined", retry_after_s=1.0)
        decode = pick(decoders, lambda worker: affinity_minus_load(request, worker, decoders))
        separation = self._separator.decide(request, workers, decode)
        prefill = None
        if separation.disaggregate:
            prefillers = [worker for worker in workers if worker.prefills and worker.worker_id != decode.worker_id]
            prefill = pick(prefillers, lambda worker: affinity_minus_load(request, worker, prefillers))
            decode = _nearest(request, prefill, decode, decoders)
        stores = [worker for worker in workers if worker.role is WorkerRole.KV_STORE]
        return Placement(
            decode_worker_id=decode.worker_id,
            prefill_worker_id=prefill.worker_id if prefill else None,
            kv_store_worker_id=pick(stores, lambda worker: 0.0).worker_id if stores else None,
            strategy=self.name,
            reason="; ".join(
                [separation.reason, _why("decode", decode), *([_why("prefill", prefill)] if prefill else [])]
            ),
        )


NOTICEABLY = 1.25
"""Links whose costs differ by less are equal, for measurements do: workers behind them take turns."""


def _nearest(
    request: RequestView, prefill: WorkerView, chosen: WorkerView, decoders: Sequence[WorkerView]
) -> WorkerView:
    """Of the decode workers that are as good as the chosen one the one that KV comes to soonest."""
    equals = [
        (seconds, worker)
        for worker in decoders
        if (worker.matched_tokens, worker.outstanding) == (chosen.matched_tokens, chosen.outstanding)
        and worker.worker_id != prefill.worker_id
        and (seconds := request.pull_seconds(prefill.worker_id, worker.worker_id)) is not None
    ]
    known = {worker.worker_id: seconds for seconds, worker in equals}
    soonest = min(known.values(), default=0.0)
    if chosen.worker_id not in known or known[chosen.worker_id] <= NOTICEABLY * soonest:
        return chosen
    return pick([worker for seconds, worker in equals if seconds <= NOTICEABLY * soonest], lambda worker: 0.0)


def _why(part: str, worker: WorkerView) -> str:
    return (
        f"{part} on {worker.worker_id}: {worker.matched_tokens} prompt tokens cached, {worker.outstanding} outstanding"
    )
