"""look → demand → plan → act, once per interval. Everything that was decided is kept for `explain`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sagellm_common.core.clock import Clock
from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.core.errors import SageError
from sagellm_common.core.types import WorkerRole
from services.autoscaler.demand import Demand, Window, demand_of
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.observe import Cluster
from services.autoscaler.orchestrator import Orchestrator, Phase
from services.autoscaler.pace import Pace
from services.autoscaler.planner import Decision, Fleet, Planner

log = logging.getLogger(__name__)

REMEMBERED = 256


class Looks(Protocol):
    async def look(self) -> Cluster: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One look, what was decided and what was done."""

    at_s: float
    fleet: Fleet
    decision: Decision
    done: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Autoscaler:
    """`run` until cancelled. One of several replicas runs at a time: the leader."""

    def __init__(
        self,
        config: AutoscalerConfig,
        observer: Looks,
        planner: Planner,
        orchestrator: Orchestrator,
        metrics: AutoscalerMetrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self._observer = observer
        self._planner = planner
        self._orchestrator = orchestrator
        self._metrics = metrics
        self._clock = clock
        self._window = Window()
        self._looked_s: float | None = None
        self._pace = Pace(config.cooldown_s)
        self._demand: Demand | None = None
        self.steps: deque[Step] = deque(maxlen=REMEMBERED)

    async def run(self) -> None:
        while True:
            try:
                await self.step()
            except SageError as err:
                self._metrics.failures.labels(err.reason).inc()
                log.warning("nothing is changed: %s", err.message)
            await asyncio.sleep(self._config.interval_s)

    async def step(self) -> Step | None:
        """None at the first look: there is nothing yet to compare the counters with. Raises PeerLost, ConfigError."""
        cluster = await self._observer.look()
        now_s, before_s = self._clock.now(), self._looked_s
        self._looked_s, grown = now_s, self._window.take(cluster.counters)
        if before_s is None or now_s <= before_s:
            return None
        self._demand = demand_of(grown, now_s - before_s, self._demand)
        self._orchestrator.look(cluster.workers)
        fleet = Fleet(
            await self._orchestrator.replicas("prefill"),
            await self._orchestrator.replicas("decode"),
            cluster.prefill_ready,
            cluster.decode_ready,
            cluster.least_requests(WorkerRole.PREFILL),
            cluster.least_requests(WorkerRole.DECODE),
            self._orchestrator.fixed,
        )
        self._planner.limits = cluster.limits
        decision = self._planner.plan(self._demand, fleet)
        step = Step(now_s, fleet, decision, await self._act(decision, fleet, now_s))
        self.steps.append(step)
        self._metrics.record(fleet, decision, self._planner)
        return step

    async def _act(self, decision: Decision, fleet: Fleet, now_s: float) -> str:
        """As far as the pace allows; in words."""
        waits, done, flips = self._pace.waits(fleet, now_s), list[str](), decision.flips
        if flips and waits:
            done.append(f"no change of roles: {waits}")
            flips = 0
        if flips:
            self._orchestrator.flip(flips)
            self._pace.changed(now_s)
            self._metrics.flips.labels("prefill" if flips > 0 else "decode").inc(abs(flips))
            waits = "roles are changing"
        if settled := await self._orchestrator.settle():
            done.append(settled)
        phases: tuple[tuple[Phase, int, int], ...] = (
            ("prefill", fleet.prefill + flips, decision.prefill),
            ("decode", fleet.decode - flips, decision.decode),
        )
        if self._orchestrator.flips and any(wanted > asked for _, asked, wanted in phases):
            waits = waits or "the other phase's come first"  # of one workload: it would not grow
        for phase, asked, wanted in phases if not self._orchestrator.fixed else ():
            if wanted < asked and waits:
                done.append(f"{phase} stays at {asked}: {waits}")
            elif wanted != asked:
                await self._orchestrator.scale(phase, wanted)
                self._pace.changed(now_s)
                self._metrics.changes.labels(phase, "up" if wanted > asked else "down").inc()
                done.append(f"{phase} from {asked} to {wanted}")
        if not done:
            return "nothing: it is as it should be"
        text = "; ".join(done)
        log.info("%s, for %s", text, decision.reason)
        return text
