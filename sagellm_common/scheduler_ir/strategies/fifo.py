"""First come, first served: each request goes at once to the worker with the best prefix affinity − load."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, Placement, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load, pick


@STRATEGIES.register("fifo")
class Fifo:
    name = "fifo"

    def __init__(self) -> None:
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


def _why(part: str, worker: WorkerView) -> str:
    return (
        f"{part} on {worker.worker_id}: {worker.matched_tokens} prompt tokens cached, {worker.outstanding} outstanding"
    )
