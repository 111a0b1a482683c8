"""Who carries plans out: the router over gRPC, and the simulator on its virtual clock."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, PlanNodeKind


class NodeState(enum.StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({NodeState.DONE, NodeState.FAILED, NodeState.CANCELLED})


@dataclass(frozen=True, slots=True)
class PlanStatus:
    """How far a plan is, by node id."""

    plan_id: str
    nodes: Mapping[int, NodeState]

    @property
    def ended(self) -> bool:
        return all(state in ENDED for state in self.nodes.values())


@dataclass(slots=True)
class PlanProgress:
    """What an executor keeps of a plan that it carries out."""

    plan: ExecutionPlan
    stage: PlanNodeKind | None = None
    """The kind that was entered last."""
    _states: dict[int, NodeState] = field(init=False)

    def __post_init__(self) -> None:
        self._states = {node.node_id: NodeState.PENDING for node in self.plan.nodes}

    def enter(self, *kinds: PlanNodeKind, state: NodeState = NodeState.RUNNING) -> None:
        """All nodes of these kinds are in this state now."""
        self.stage = kinds[0]
        for node in self.plan.nodes:
            if node.kind in kinds:
                self._states[node.node_id] = state

    def done(self, *kinds: PlanNodeKind) -> None:
        self.enter(*kinds, state=NodeState.DONE)

    def end(self, state: NodeState) -> None:
        """No more comes of it: what runs ends in this state, what has not begun is cancelled. (After all went well
        nothing is left.)"""
        for node_id, now in self._states.items():
            if now is NodeState.RUNNING:
                self._states[node_id] = state
            elif now is NodeState.PENDING:
                self._states[node_id] = NodeState.DONE if state is NodeState.DONE else NodeState.CANCELLED

    @property
    def status(self) -> PlanStatus:
        return PlanStatus(self.plan.plan_id, dict(self._states))


Work = TypeVar("Work", contravariant=True)
Result = TypeVar("Result", covariant=True)


class ExecutorAPI(Protocol[Work, Result]):
    """`Work` is what a plan does not carry (the tokens, and what the executor needs beside); `Result` is what there
    is to wait for or iterate: a stream of tokens, or nothing where a clock drives it all."""

    def submit_plan(self, plan: ExecutionPlan, work: Work) -> Result:
        """Carries it out. Raises InvalidRequest for the id of a plan that is under way."""

    def cancel(self, plan_id: str) -> bool:
        """Ends a plan under way and gives back what it holds; False for one that is not, which is no error."""

    def status(self, plan_id: str) -> PlanStatus | None:
        """None for a plan that is not under way."""
