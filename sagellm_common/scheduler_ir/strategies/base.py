"""What a placement strategy sees and answers: filter → score in [0, 1] → pick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sagellm_common.core.registry import Registry
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import Order

PullSeconds = Callable[[str, str], float | None]
"""(prefill worker's id, decode worker's id) → how long the request's KV is on its way between them; None: not known."""


def _not_known(prefill_worker_id: str, decode_worker_id: str) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class RequestView:
    """What matters of a request for placing it. `waited_s` since it arrived; targets are infinite where it has none.

    `pull_seconds` is the same for as long as the view is used.
    """

    request_id: str
    num_prompt_tokens: int
    priority: int = 0
    pull_seconds: PullSeconds = field(default=_not_known, compare=False)
    waited_s: float = 0.0
    ttft_target_s: float = math.inf
    tpot_target_s: float = math.inf
    model: str = ""
    service_class: str = ""


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What one worker has to do for one model: requests that wait or decode, tokens queued or of context."""

    model: str
    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What matters of a worker for placing one request. A value: the caller takes a fresh one per decision.

    `outstanding` are requests sent there and not finished, `assigned` all ever sent (breaks ties, so that equal
    workers take turns), `matched_tokens` the leading prompt tokens whose KV it holds. `queued_tokens` are prompt tokens
    it was sent and has not computed, with `queued_squares` the Σ (end² − start²) of them; `sequences` decode there on
    `context_tokens` of KV.

    Of a worker that hosts several models: which (`hosts`), which is loaded (`model`), the groups of prompts of one
    model that are queued, in their order (`queue`), and what decodes there (`batches`).
    """

    worker_id: str
    role: WorkerRole
    outstanding: int = 0
    assigned: int = 0
    matched_tokens: int = 0
    queued_tokens: int = 0
    queued_squares: int = 0
    sequences: int = 0
    context_tokens: int = 0
    model: str = ""
    hosts: tuple[str, ...] = ()
    queue: tuple[ModelWork, ...] = ()
    batches: tuple[ModelWork, ...] = ()

    @property
    def prefills(self) -> bool:
        return self.role in (WorkerRole.PREFILL, WorkerRole.BOTH)

    @property
    def decodes(self) -> bool:
        return self.role in (WorkerRole.DECODE, WorkerRole.BOTH)


@dataclass(frozen=True, slots=True)
class Placement:
    """Who does what. No `prefill_worker_id`: the decode worker computes the prompt itself.

    `late`: its first token cannot come within the target, wherever; those that still can go first. `expected_s` are
    (worker's id, seconds until the first token if it prefills), the chosen one's first, as far as costs are known.
    `chunk_tokens`: without a prefill worker, so many prompt tokens are computed between two steps of those who decode
    there (0: as the worker is configured). `switch_worker_ids` have to load the request's model first.
    """

    decode_worker_id: str
    prefill_worker_id: str | None = None
    kv_store_worker_id: str | None = None
    strategy: str = ""
    reason: str = ""
    late: bool = False
    expected_s: tuple[tuple[str, float], ...] = ()
    chunk_tokens: int = 0
    switch_worker_ids: tuple[str, ...] = ()


class Strategy(Protocol):
    """Places one request. Pure: the same views, and the same costs learned, give the same answer.

    `order` is that of the waiting, inside the engines and before; `fair`, that tenants take turns there.
    """

    @property
    def name(self) -> str: ...

    @property
    def order(self) -> Order: ...

    @property
    def fair(self) -> bool: ...

    def place(self, request: RequestView, workers: Sequence[WorkerView]) -> Placement:
        """Raises NoWorker when nobody among `workers` can decode."""


STRATEGIES: Registry[Callable[[CostModel | None], Strategy]] = Registry("strategy")
