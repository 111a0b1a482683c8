"""Where workers come from: what an orchestrator can do, and one that only says what it would do.

KubernetesScale   two workloads, one per phase: their sizes. A pod that changed its role would still be counted as
                  of the phase that it left, and come back to that: roles are left alone
Pool              workers that take either role, of one workload or of a fixed number: its size, and their roles
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

from sagellm_common.client.router import WorkerView

log = logging.getLogger(__name__)

Phase = Literal["prefill", "decode"]
Workload = Literal["prefill", "decode", "pool"]


class Orchestrator(Protocol):
    """Raises PeerLost when it cannot be reached, ConfigError when it does not know the workload or must not."""

    flips: bool
    """Whether its workers may change their roles."""
    fixed: bool
    """Whether there are as many workers as there are."""

    def look(self, workers: Sequence[WorkerView]) -> None:
        """Call it first, with all that the router knows of."""

    async def replicas(self, phase: Phase) -> int:
        """Workers that are asked for."""

    async def scale(self, phase: Phase, replicas: int) -> None:
        """Asks for so many. Who goes is told to drain first."""

    def flip(self, count: int) -> None:
        """Asks for so many prefill workers more and decode workers less; < 0: the reverse. Only where `flips`."""

    async def settle(self) -> str:
        """Brings the roles to what was asked for, once. What it did, in words."""


class DryRun:
    """Reads from `inner`, changes nothing, says what it would do."""

    def __init__(self, inner: Orchestrator) -> None:
        self._inner = inner
        self.flips, self.fixed = inner.flips, inner.fixed

    def look(self, workers: Sequence[WorkerView]) -> None:
        self._inner.look(workers)

    async def replicas(self, phase: Phase) -> int:
        return await self._inner.replicas(phase)

    async def scale(self, phase: Phase, replicas: int) -> None:
        log.info("dry run: %s would be scaled to %d", phase, replicas)

    def flip(self, count: int) -> None:
        before, after = ("decode", "prefill") if count > 0 else ("prefill", "decode")
        log.info("dry run: %d %s workers would become %s", abs(count), before, after)

    async def settle(self) -> str:
        return ""
