"""Whose turn it is inside an engine: order of the waiting, who gives way when memory runs out, prefill or decode.

Pure and stateless, as the placement strategies are: the engine shows views, the policy answers. A `StepPlan` overrides
the policy for as long as it is in force.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Order = Literal["fifo", "priority", "aging", "deadline", "feasible", "on_time"]

AGING_S = 1.0
"""So long a wait is worth one level of priority where these age."""


@dataclass(frozen=True, slots=True)
class SequenceView:
    """What matters of one sequence. `arrival` counts submissions; `arrived_s`, `deadline_s` are on the engine's clock.

    `handed_over`: KV of its first tokens came from another worker. `computed_tokens` have KV in the engine now.
    `needed_s` is what the cost model expects its prompt to take yet.
    """

    request_id: str
    arrival: int
    priority: int = 0
    deadline_s: float = math.inf
    computed_tokens: int = 0
    handed_over: bool = False
    needed_s: float = 0.0
    arrived_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Some wait, and there is a slot for one. `decode_steps` were done since a prefill of `last_prefill_tokens`."""

    num_waiting: int
    num_running: int
    last_prefill_tokens: int = 0
    decode_steps: int = 0


class EnginePolicy(Protocol):
    def order_waiting(self, waiting: Sequence[SequenceView], now_s: float = 0.0) -> list[SequenceView]:
        """All of them; the first starts first. `now_s` is on the clock of their deadlines."""

    def order_victims(self, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        """All of them; the first loses its memory first, and is computed again later."""

    def prefill_next(self, load: EngineLoad) -> bool:
        """Whether waiting sequences go now, or those that run decode once more. True where nothing runs."""


@dataclass(frozen=True, slots=True)
class RankedPolicy:
    """By rank: `fifo` is arrival alone, `priority` puts the larger first, `deadline` the earlier among equals of those.

    `aging` adds a level of priority for each AGING_S waited, which is to go by arrival, put forward by priority.
    `feasible` is `deadline`, but those that are too late anyway go last; `on_time` is `deadline`, once those are set
    aside that keep most others from being in time (`on_time_first`).

    Victims are taken from the lowest rank up. A handed-over sequence with more than `cheap_recompute_tokens` goes last:
    to compute it again costs this worker the very prefill it was to be spared.
    `prefill_tokens_per_decode_step` bounds how much prompts may delay who decodes; 0 is no bound.
    """

    order: Order = "priority"
    cheap_recompute_tokens: int = 512
    prefill_tokens_per_decode_step: int = 0

    def order_waiting(self, waiting: Sequence[SequenceView], now_s: float = 0.0) -> list[SequenceView]:
        ranked = sorted(waiting, key=self.rank)
        match self.order:
            case "on_time":
                return on_time_first(ranked, now_s)
            case "feasible":
                return sorted(ranked, key=lambda view: now_s + view.needed_s > view.deadline_s)
        return ranked

    def order_victims(self, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        lowest_first = sorted(sequences, key=self.rank, reverse=True)
        return sorted(lowest_first, key=self._dear)

    def prefill_next(self, load: EngineLoad) -> bool:
        earned = load.decode_steps * self.prefill_tokens_per_decode_step
        return not load.num_running or not self.prefill_tokens_per_decode_step or earned >= load.last_prefill_tokens

    def _dear(self, view: SequenceView) -> bool:
        return view.handed_over and view.computed_tokens > self.cheap_recompute_tokens

    def rank(self, view: SequenceView) -> tuple[float, ...]:
        match self.order:
            case "fifo":
                return (view.arrival,)
            case "priority":
                return (-view.priority, view.arrival)
            case "aging":
                return (view.arrived_s - AGING_S * view.priority, view.arrival)
            case "deadline" | "feasible" | "on_time":
                return (-view.priority, view.deadline_s, view.arrival)


def on_time_first(by_deadline: Sequence[SequenceView], now_s: float) -> list[SequenceView]:
    """Those of which the most meet their deadlines, in that order; then the others, the quickest first.

    Moore and Hodgson's rule (Moore 1968, Management Science 15:1): in order of deadline, and whenever one would be
    late, the longest so far is set aside. With equal weights and no arrivals to come, no order has fewer late ones.
    """
    chosen: list[tuple[float, int]] = []  # heap, the longest first
    end_s = now_s
    for place, view in enumerate(by_deadline):
        end_s += view.needed_s
        heapq.heappush(chosen, (-view.needed_s, -place))
        if end_s > view.deadline_s:
            longest, _ = heapq.heappop(chosen)
            end_s += longest
    kept = {-place for _, place in chosen}
    first = [view for place, view in enumerate(by_deadline) if place in kept]
    rest = [view for place, view in enumerate(by_deadline) if place not in kept]
    return first + sorted(rest, key=lambda view: (view.needed_s, view.arrival))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What an engine is to do, by request id. Who is not named follows, in the policy's order.

    `prefill` True or False forbids the policy the choice: with False nobody starts while the plan is in force.
    Raises ValueError when an id stands twice.
    """

    start: tuple[str, ...] = ()
    """Waiting sequences, first to start first."""
    give_way: tuple[str, ...] = ()
    """Victims, first to lose its memory first."""
    prefill: bool | None = None

    def __post_init__(self) -> None:
        for name in ("start", "give_way"):
            ids = getattr(self, name)
            if len(set(ids)) != len(ids):
                raise ValueError(f"StepPlan.{name} names a request twice: {ids}")


@dataclass(frozen=True, slots=True)
class PlannedPolicy:
    """A plan over the policy that answers what the plan leaves open."""

    plan: StepPlan
    otherwise: EnginePolicy

    def order_waiting(self, waiting: Sequence[SequenceView], now_s: float = 0.0) -> list[SequenceView]:
        return _named_first(self.plan.start, self.otherwise.order_waiting(waiting, now_s))

    def order_victims(self, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        return _named_first(self.plan.give_way, self.otherwise.order_victims(sequences))

    def prefill_next(self, load: EngineLoad) -> bool:
        return self.otherwise.prefill_next(load) if self.plan.prefill is None else self.plan.prefill


def _named_first(ids: tuple[str, ...], views: list[SequenceView]) -> list[SequenceView]:
    place = {request_id: i for i, request_id in enumerate(ids)}
    return sorted(views, key=lambda view: place.get(view.request_id, len(place)))
