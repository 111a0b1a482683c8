"""Disaggregate or not: whether a request is prefilled elsewhere than it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_common.scheduler_ir.strategies.base import RequestView, WorkerView


@dataclass(frozen=True, slots=True)
class Separation:
    disaggregate: bool
    reason: str


class PDSeparator:
    """Disaggregates whenever somebody else than the decode worker serves prefill."""

    def decide(self, request: RequestView, workers: Sequence[WorkerView], decode: WorkerView) -> Separation:
        if any(worker.prefills and worker.worker_id != decode.worker_id for worker in workers):
            return Separation(True, "disaggregated: prefill and decode workers are serving")
        return Separation(False, "local prefill: no prefill worker is serving")
