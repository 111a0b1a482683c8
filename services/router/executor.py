"""ExecutorAPI over the workers' sessions: which plans are under way, how far they are, and how one is ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from sagellm_common.core.errors import Cancelled, InvalidRequest
from sagellm_common.core.types import GenerationOutput
from sagellm_common.scheduler_ir.executor_api import NodeState, PlanProgress, PlanStatus
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan
from services.router.admission import Slot
from services.router.generation import Generation
from services.router.moves import Move, Moved
from services.router.stages import Admitted, Routed


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a plan does not carry: the request, its workers' sessions, and what it has become so far."""

    admitted: Admitted
    routed: Routed
    generation: Generation
    slot: Slot
    move: Move | None = None


CarryOut = Callable[[Attempt, PlanProgress], AsyncGenerator[GenerationOutput, None]]
"""The stages of a plan, from reserving to the last token; they tell the progress which nodes are at work and done."""


class GrpcExecutor:
    def __init__(self, carry_out: CarryOut) -> None:
        self._carry_out = carry_out
        self._under_way: dict[str, tuple[Attempt, PlanProgress]] = {}

    def submit_plan(self, plan: ExecutionPlan, work: Attempt) -> AsyncGenerator[GenerationOutput, None]:
        """Iterate under `aclosing`. Raises what the workers answer, PeerLost, DeadlineExceeded, Cancelled, Moved; what
        they hold then is left to the slot's calls."""
        if plan.plan_id in self._under_way:
            raise InvalidRequest(f"plan {plan.plan_id} is under way already; use a new id")
        return self._run(plan, work)

    def cancel(self, plan_id: str) -> bool:
        if (found := self._under_way.get(plan_id)) is None:
            return False
        work, _ = found
        work.slot.calls.cancel()
        work.slot.cancelled.set()
        return True

    def status(self, plan_id: str) -> PlanStatus | None:
        found = self._under_way.get(plan_id)
        return found[1].status if found is not None else None

    async def _run(self, plan: ExecutionPlan, work: Attempt) -> AsyncGenerator[GenerationOutput, None]:
        progress = work.generation.explanation.progress = PlanProgress(plan)
        self._under_way[plan.plan_id] = work, progress
        ended = NodeState.FAILED
        try:
            async with aclosing(self._carry_out(work, progress)) as outputs:
                async for output in outputs:
                    yield output
            ended = NodeState.DONE
        except (GeneratorExit, asyncio.CancelledError, Cancelled, Moved):
            ended = NodeState.CANCELLED
            raise
        finally:
            del self._under_way[plan.plan_id]
            progress.end(ended)
