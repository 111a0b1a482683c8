"""`scheduler_ir`'s policies as what LMDeploy's scheduler asks: hook `policy`, and a plan put into `execution_plan`.

Without patch 0003 LMDeploy orders by arrival and preempts the latest; prefill or decode is the policy's choice all the
same, for the engine's loop is ours.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sagellm_common.scheduler_ir.engine_policy import EngineLoad, EnginePolicy, PlannedPolicy, SequenceView, StepPlan

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SequenceFacts:
    """What LMDeploy does not know of a sequence; see SequenceView."""

    request_id: str
    priority: int
    deadline_s: float
    handed_over: bool
    arrival: int
    arrived_s: float = 0.0
    needed_s: float = 0.0


@dataclass(slots=True)
class _Seen:
    facts: dict[int, SequenceFacts] = field(default_factory=dict)  # by session id
    arrivals: Iterator[int] = field(default_factory=itertools.count)
    last_prefill_tokens: int = 0
    decode_steps: int = 0


class Steering:
    """One policy for one engine, under the names and with the sequences of LMDeploy. The pool's lock is held.

    A policy that raises or loses a sequence stops nothing: LMDeploy's choice stands that time, and the log says so.
    """

    def __init__(self, policy: EnginePolicy, seen: _Seen | None = None) -> None:
        self._policy = policy
        self._seen = seen or _Seen()

    def planned(self, plan: StepPlan) -> Steering:
        """The same with a plan over the policy."""
        return Steering(PlannedPolicy(plan, self._policy), self._seen)

    def enter(
        self,
        session_id: int,
        request_id: str,
        priority: int,
        deadline_s: float,
        handed_over: bool,
        *,
        arrived_s: float = 0.0,
        needed_s: float = 0.0,
    ) -> None:
        """Times are on the clock that orders are asked by."""
        self._seen.facts[session_id] = SequenceFacts(
            request_id, priority, deadline_s, handed_over, next(self._seen.arrivals), arrived_s, needed_s
        )

    def leave(self, session_id: int) -> None:
        del self._seen.facts[session_id]

    def stepped(self, prefill_tokens: int) -> None:
        """After each step; 0 for one that decoded."""
        if prefill_tokens:
            self._seen.last_prefill_tokens, self._seen.decode_steps = prefill_tokens, 0
        else:
            self._seen.decode_steps += 1

    # ---- what LMDeploy asks ----

    def order_waiting(self, scheduler: Any, sequences: list[Any]) -> list[Any]:
        now_s = time.monotonic()
        return self._ordered(sequences, lambda views: self._policy.order_waiting(views, now_s))

    def order_victims(self, scheduler: Any, sequences: list[Any]) -> list[Any]:
        return self._ordered(sequences, self._policy.order_victims)

    def order_running(self, scheduler: Any, sequences: list[Any]) -> list[Any]:
        """LMDeploy preempts from the end."""
        return self._ordered(sequences, lambda views: self._policy.order_victims(views)[::-1])

    def should_prefill(self, scheduler: Any, possible: bool) -> bool:
        if not possible:
            return False
        seen = self._seen
        load = EngineLoad(scheduler.num_waiting(), scheduler.num_running(), seen.last_prefill_tokens, seen.decode_steps)
        try:
            return self._policy.prefill_next(load)
        except Exception:
            log.exception("the policy failed on %s", load)
            return possible

    def _ordered(self, sequences: list[Any], order: Callable[[list[SequenceView]], list[SequenceView]]) -> list[Any]:
        if len(sequences) < 2:
            return sequences
        try:
            by_id = {self._seen.facts[seq.session_id].request_id: seq for seq in sequences}
            ordered = [by_id.pop(view.request_id) for view in order([self._view(seq) for seq in sequences])]
            if by_id:
                raise ValueError(f"the policy lost {', '.join(by_id)}")
        except Exception:
            log.exception("the policy failed on %d sequences", len(sequences))
            return sequences
        return ordered

    def _view(self, seq: Any) -> SequenceView:
        facts = self._seen.facts[seq.session_id]
        return SequenceView(
            request_id=facts.request_id,
            arrival=facts.arrival,
            priority=facts.priority,
            deadline_s=facts.deadline_s,
            computed_tokens=int(seq.num_history_ids),
            handed_over=facts.handed_over,
            arrived_s=facts.arrived_s,
            needed_s=facts.needed_s,
        )


class PolicyHook:
    """LMDeploy has one policy per process, we have one per engine. Schedulers of others keep their order."""

    def __init__(self) -> None:
        self._steering: WeakKeyDictionary[Any, Steering] = WeakKeyDictionary()

    def steer(self, scheduler: Any, steering: Steering) -> None:
        self._steering[scheduler] = steering

    def order_waiting(self, scheduler: Any, sequences: list[Any]) -> list[Any]:
        return self._ask(Steering.order_waiting, scheduler, sequences)

    def order_running(self, scheduler: Any, sequences: list[Any]) -> list[Any]:
        return self._ask(Steering.order_running, scheduler, sequences)

    def order_victims(self, scheduler: Any, sequences: list[Any]) -> list[Any]:
        return self._ask(Steering.order_victims, scheduler, sequences)

    def should_prefill(self, scheduler: Any, possible: bool) -> bool:
        return self._ask(Steering.should_prefill, scheduler, possible)

    def _ask(self, question: Callable[[Steering, Any, T], T], scheduler: Any, value: T) -> T:
        steering = self._steering.get(scheduler)
        return value if steering is None else question(steering, scheduler, value)


POLICY = PolicyHook()
