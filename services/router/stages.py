"""The states a request passes through, one value each: Admitted → Matched → Routed → Prefilled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import DeadlineExceeded, EngineFailed
from sagellm_common.core.types import GenerationRequest, KvPeer, KvSource, ModelInfo
from sagellm_common.rpc.sessions import PrefillOutcome
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan
from sagellm_common.scheduler_ir.pd_separation import Separation
from sagellm_common.scheduler_ir.strategies import Placement, RequestView, WorkerView
from services.router.workers import WorkerLink

DEADLINE_MARGIN_S = 0.02
"""Internal calls end this much before the request does, so that it is the router that says why."""


@dataclass(frozen=True, slots=True)
class Deadline:
    clock: Clock
    at_s: float

    def remaining_s(self) -> float:
        return self.at_s - self.clock.now()

    def budget_s(self) -> float:
        """Time for an internal call. Raises DeadlineExceeded when there is none."""
        budget = self.remaining_s() - DEADLINE_MARGIN_S
        if budget <= 0:
            raise DeadlineExceeded("the request's deadline has passed; allow more time or fewer tokens")
        return budget


@dataclass(frozen=True, slots=True)
class Admitted:
    """Valid, and within the bound of requests in flight. `request` has an id and, if it samples, a seed."""

    request: GenerationRequest
    model: ModelInfo
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Matched:
    """Leading prompt tokens whose KV each worker holds, by worker id; those with none are absent.

    `stored_tokens`: that the kv_stores hold between them.
    """

    cached_tokens: Mapping[str, int]
    stored_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the strategy saw, and what it answered: kept for people who ask why."""

    request: RequestView
    workers: Sequence[WorkerView]
    placement: Placement


@dataclass(frozen=True, slots=True)
class Routed:
    """One attempt's plan and workers. No `prefill`: the decode worker computes, or pulls from an earlier prefill.

    `expected_s` is `Placement`'s; `peer` holds what the plan has the prefill worker fetch out of a cache.
    """

    plan: ExecutionPlan
    decode: WorkerLink
    prefill: WorkerLink | None
    expected_s: tuple[tuple[str, float], ...]
    separation: Separation | None
    seen: Seen
    peer: KvPeer | None = None


@dataclass(frozen=True, slots=True)
class Pinned:
    """KV that waits on a worker to be pulled by the next decode worker; that worker's attempt has pinned it.

    `moved`: with the generated tokens' KV, from a decode worker that has handed the generation over.
    """

    source: KvSource
    worker: WorkerLink
    attempt: int
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Prefilled:
    """First token known and KV pinned on the prefill worker; or the end of it all.

    Raises EngineFailed when the worker answered neither.
    """

    outcome: PrefillOutcome
    worker: WorkerLink
    attempt: int

    def __post_init__(self) -> None:
        outcome = self.outcome
        if outcome.finish_reason is None and (outcome.source is None or len(outcome.token_ids) != 1):
            raise EngineFailed(f"prefill worker {self.worker.worker_id} answered without a first token and its KV")

    @property
    def pinned(self) -> Pinned | None:
        source = self.outcome.source
        return Pinned(source, self.worker, self.attempt) if source is not None else None
