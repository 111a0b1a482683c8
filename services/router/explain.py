"""What happened to recent requests, for ExplainPlan and `sagellm explain`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.scheduler_ir.executor_api import PlanProgress
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan
from services.router.stages import Routed

MAX_EVENTS = 200


class PlanEvent(NamedTuple):
    """One stage of one attempt. `at_ms` counts from admission."""

    stage: str
    at_ms: float
    duration_ms: float
    detail: str = ""


@dataclass(slots=True)
class Explanation:
    """The latest plan, what was known when it was made and how far it is, and every stage of every attempt.

    `took_s` from the plan until the second token, once it is known.
    """

    request_id: str
    plan: ExecutionPlan | None = None
    events: list[PlanEvent] = field(default_factory=list)
    told: Callable[[], Sequence[PlanEvent]] = tuple
    """What a client that went to the workers itself has told at the end."""
    routed: Routed | None = None
    progress: PlanProgress | None = None
    took_s: float | None = None

    def add(self, stage: str, at_ms: float, duration_ms: float, detail: str = "") -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(PlanEvent(stage, at_ms, duration_ms, detail))


class ExplainLog:
    """The explanations of the latest `max_requests` requests."""

    def __init__(self, max_requests: int = 1000) -> None:
        self._max_requests = max_requests
        self._entries: OrderedDict[str, Explanation] = OrderedDict()

    def begin(self, request_id: str) -> Explanation:
        """An id that comes again starts afresh."""
        self._entries.pop(request_id, None)
        entry = self._entries[request_id] = Explanation(request_id)
        while len(self._entries) > self._max_requests:
            self._entries.popitem(last=False)
        return entry

    def require(self, request_id: str) -> Explanation:
        """Raises InvalidRequest for a request that is unknown or too long ago."""
        entry = self._entries.get(request_id)
        if entry is None:
            raise InvalidRequest(
                f"request {request_id!r} is not among the latest {self._max_requests} of this router",
                metadata={"field": "request_id"},
            )
        return entry

    def get(self, request_id: str) -> Explanation | None:
        return self._entries.get(request_id)
