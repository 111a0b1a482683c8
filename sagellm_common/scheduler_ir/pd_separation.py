"""Disaggregate or not: whether a request is prefilled elsewhere than it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.strategies.base import RequestView, WorkerView


@dataclass(frozen=True, slots=True)
class Separation:
    disaggregate: bool
    reason: str


STORED_PREFIX_REST_TOKENS = 32
"""So few tokens to compute hold up a decode worker's step hardly longer than its other sequences do."""


class PDSeparator:
    """Disaggregates whenever somebody else than the decode worker serves prefill, and there is something to prefill.

    There is not when the kv_store holds nearly all of the prompt: then the decode worker fetches that, more than it
    holds itself, straight from there, instead of a prefill worker that would fetch it and hand it over.
    """

    def decide(self, request: RequestView, workers: Sequence[WorkerView], decode: WorkerView) -> Separation:
        stored = max((worker.matched_tokens for worker in workers if worker.role is WorkerRole.KV_STORE), default=0)
        rest = request.num_prompt_tokens - stored
        if stored > decode.matched_tokens and rest <= STORED_PREFIX_REST_TOKENS:
            return Separation(False, f"local prefill: the kv_store holds all but {rest} prompt tokens")
        if any(worker.prefills and worker.worker_id != decode.worker_id for worker in workers):
            return Separation(True, "disaggregated: prefill and decode workers are serving")
        return Separation(False, "local prefill: no prefill worker is serving")
