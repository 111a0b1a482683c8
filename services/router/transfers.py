"""Whether a prompt's KV is worth moving while it is computed: from what links cost and how fast workers prefill."""

from __future__ import annotations

from collections.abc import Callable

from sagellm_common.comm_backend.overlap import OverlapPlan, plan_overlap
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.topology import LinkCost
from services.router.workers import WorkerLink

SMOOTHING = 0.2
"""Weight of the latest prefill in the speed of its worker."""
MAX_SEGMENT_BYTES = 4 << 20


class TransferPlanner:
    """`cost` tells what the link from one worker to another costs (ids; None: it was not measured).

    Where the configuration says itself when to overlap, nothing is planned.
    """

    def __init__(self, cfg: TransportConfig, cost: Callable[[str, str], LinkCost | None]) -> None:
        self._plans = cfg.overlap == "auto" and cfg.overlap_min_bytes is None
        self._cost = cost
        self._tokens_per_s: dict[str, float] = {}

    def observe(self, worker_id: str, num_tokens: int, compute_s: float) -> None:
        """A worker has computed that many prompt tokens."""
        if num_tokens <= 0 or compute_s <= 0:
            return
        speed = num_tokens / compute_s
        known = self._tokens_per_s.get(worker_id, speed)
        self._tokens_per_s[worker_id] = known + SMOOTHING * (speed - known)

    def plan(
        self, prefill: WorkerLink, decode: WorkerLink, *, compute_tokens: int, move_tokens: int
    ) -> OverlapPlan | None:
        """For a prompt of which so many tokens are to be computed and moved; None: too little is known."""
        link = self._cost(prefill.worker_id, decode.worker_id)
        speed = self._tokens_per_s.get(prefill.worker_id)
        model = prefill.record.model
        if not self._plans or link is None or speed is None or model is None or min(compute_tokens, move_tokens) <= 0:
            return None
        layout = model.kv_layout
        blocks = -(-move_tokens // layout.block_size_tokens)
        least = max(1, layout.block_bytes // layout.num_layers)
        return plan_overlap(
            blocks * layout.block_bytes,
            compute_tokens / speed,
            link,
            block_bytes=layout.block_bytes,
            least_bytes=least,
            most_bytes=max(least, MAX_SEGMENT_BYTES),
        )
