"""By load: `fifo` while there is little to do, `hybrid` while there is much, with hysteresis between the two.

A calm cluster needs no forecast: spreading requests, cached prefixes first, keeps every queue short. Under load it pays
to compute less and to choose whom to serve in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order
from sagellm_common.scheduler_ir.strategies.base import STRATEGIES, Placement, RequestView, WorkerView
from sagellm_common.scheduler_ir.strategies.fifo import Fifo
from sagellm_common.scheduler_ir.strategies.hybrid import Hybrid

BUSY, CALM = 0.3, 0.1
"""Pressure from which on it is busy, and below which it is calm again."""
UNTARGETED_S = 1.0
"""Stands for a target of the first token where there is none."""


@STRATEGIES.register("adaptive")
class Adaptive:
    """Not as stateless as the others: what it decides depends on whether it was busy before. The same requests in the
    same order give the same answers."""

    name: str = "adaptive"
    order: Order = "on_time"
    fair = True

    def __init__(self, costs: CostModel | None = None) -> None:
        self._costs = costs or CostModel()
        self._calm = Fifo(costs)
        self._busy = Hybrid(costs)
        self.is_busy = False

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        pressure = self._pressure(request, workers)
        self.is_busy = pressure >= (CALM if self.is_busy else BUSY)
        placement = (self._busy if self.is_busy else self._calm).place(request, workers)
        load = "busy" if self.is_busy else "calm"
        return replace(
            placement, strategy=self.name, reason=f"{load} at {pressure:.0%} of the targets; {placement.reason}"
        )

    def _pressure(self, request: RequestView, workers: Sequence[WorkerView]) -> float:
        """The larger share of its target: of the first token by the mean wait for prefill, of the later ones by the
        mean decode step. 0 as long as costs are not known."""
        prefillers = [worker for worker in workers if worker.prefills]
        decoders = [worker for worker in workers if worker.decodes]
        pressure = 0.0
        if prefillers and self._costs.prefill.samples:
            _, token_s, square_s = self._costs.prefill.coefficients
            queued_s = sum(token_s * w.queued_tokens + square_s * w.queued_squares for w in prefillers)
            target_s = request.ttft_target_s if math.isfinite(request.ttft_target_s) else UNTARGETED_S
            pressure = queued_s / len(prefillers) / target_s
        if decoders and self._costs.decode.samples and math.isfinite(request.tpot_target_s):
            steps_s = sum(self._costs.decode_mean_s(w.sequences, w.context_tokens) for w in decoders if w.sequences)
            pressure = max(pressure, steps_s / len(decoders) / request.tpot_target_s - DECODE_FREE)
        return pressure


DECODE_FREE = 0.5
"""Of the target of the later tokens: a step that takes half of it is no pressure yet."""
