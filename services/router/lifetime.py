"""How long a request is at the workers, as the cost model has it."""

from __future__ import annotations

from collections.abc import Iterable

from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.router.workers import WorkerLink


def lifetime_s(links: Iterable[WorkerLink], costs: CostModel, answer_tokens: float) -> float | None:
    """What is queued at the least busy prefill worker, and so many steps of those who decode, at their mean pace.

    None: costs are not known yet, or nobody decodes.
    """
    serving = [link for link in links if link.usable]
    decoders = [link for link in serving if link.record.role in (WorkerRole.DECODE, WorkerRole.BOTH)]
    if not decoders or not costs.decode.samples:
        return None
    queued_s = 0.0
    if costs.prefill.samples:
        _, token_s, square_s = costs.prefill.coefficients
        prefillers = [link.work for link in serving if link.record.role in (WorkerRole.PREFILL, WorkerRole.BOTH)]
        queues = [token_s * work.queued_tokens + square_s * work.queued_squares for work in prefillers]
        queued_s = min(queues, default=0.0)
    works = [link.work for link in decoders]
    steps_s = [costs.decode_s(max(1, work.sequences), work.context_tokens).seconds for work in works]
    return queued_s + answer_tokens * sum(steps_s) / len(steps_s)
