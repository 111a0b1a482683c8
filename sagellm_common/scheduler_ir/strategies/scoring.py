"""Scores that strategies are made of. Each is in [0, 1], more is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sagellm_common.scheduler_ir.strategies.base import RequestView, WorkerView


def prefix_affinity(request: RequestView, worker: WorkerView) -> float:
    """Share of the prompt that the worker need not compute."""
    return min(1.0, worker.matched_tokens / max(1, request.num_prompt_tokens))


def load(worker: WorkerView, peers: Sequence[WorkerView]) -> float:
    """0 for an idle worker, towards 1 for the busiest of a busy group."""
    return worker.outstanding / (1 + max(peer.outstanding for peer in peers))


def affinity_minus_load(request: RequestView, worker: WorkerView, peers: Sequence[WorkerView]) -> float:
    """Prefix affinity − load, shifted from [-1, 1] to [0, 1]."""
    return (1.0 + prefix_affinity(request, worker) - load(worker, peers)) / 2.0


def promptness(seconds: float, target_s: float) -> float:
    """1 for at once, a half after as long as the target, towards 0 for never; a second stands for a missing target."""
    return 1.0 / (1.0 + seconds / (target_s if math.isfinite(target_s) else 1.0))


def pick(candidates: Sequence[WorkerView], score: Callable[[WorkerView], float]) -> WorkerView:
    """The best; of equals the one that was given the fewest requests so far, then the first by id."""
    return min(candidates, key=lambda worker: (-score(worker), worker.assigned, worker.worker_id))
