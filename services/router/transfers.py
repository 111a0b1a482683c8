"""Whether a prompt's KV is worth moving while it is computed: from what links cost and how fast workers prefill."""

from __future__ import annotations

from collections.abc import Callable

from sagellm_common.comm_backend.overlap import OverlapPlan, plan_overlap
from sagellm_common.comm_backend.wire_dtype import auto_dtype
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import WorkerRecord
from services.router.workers import WorkerLink

SMOOTHING = 0.2
"""Weight of the latest prefill in the speed of its worker."""
MAX_SEGMENT_BYTES = 4 << 20
CONVERTING = "tcp"
"""The byte path whose source converts."""


class TransferPlanner:
    """`cost` tells what the link from one worker to another costs (ids; None: it was not measured).

    Where the configuration says itself when to overlap, nothing is planned.
    """

    def __init__(self, cfg: TransportConfig, cost: Callable[[str, str], LinkCost | None]) -> None:
        self._wire_dtype = cfg.wire_dtype
        self._plans = cfg.overlap == "auto" and cfg.overlap_min_bytes is None
        self.overlaps = cfg.overlap != "off"
        """KV crosses while it is computed, where that is worth it."""
        self._cost = cost
        self._tokens_per_s: dict[str, float] = {}

    def observe(self, worker_id: str, num_tokens: int, compute_s: float) -> None:
        """A worker has computed that many prompt tokens."""
        if num_tokens <= 0 or compute_s <= 0:
            return
        speed = num_tokens / compute_s
        known = self._tokens_per_s.get(worker_id, speed)
        self._tokens_per_s[worker_id] = known + SMOOTHING * (speed - known)

    def pull_seconds(self, source: WorkerLink, decode_id: str, num_tokens: int) -> float | None:
        """How long the KV of so many tokens is on its way there; None: that was not measured."""
        link, model = self._cost(source.worker_id, decode_id), source.record.model
        if link is None or model is None:
            return None
        layout = model.kv_layout
        return link.seconds(-(-num_tokens // layout.block_size_tokens) * layout.block_bytes)

    def wire_dtype(self, source: WorkerLink, decode: WorkerLink, move_tokens: int) -> str:
        """In which dtype the KV of so many tokens crosses, as `transport.wire_dtype` or the link's speed has it.

        "": the receiver decides, for too little is known here, or the source does not convert.
        """
        models = source.record.model, decode.record.model
        if models[0] is None or models[1] is None or not _converts(source.record) or not _converts(decode.record):
            return ""
        link = self._cost(source.worker_id, decode.worker_id)
        if self._wire_dtype != "auto":
            return self._wire_dtype
        if link is None:
            return ""
        return auto_dtype(models[0].kv_layout, models[1].kv_layout, move_tokens, link.bytes_per_s)

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


def _converts(worker: WorkerRecord) -> bool:
    return worker.transport == CONVERTING or any(path.backend == CONVERTING for path in worker.paths)
