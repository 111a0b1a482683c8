"""Where workers come from: what an orchestrator can do, and one that only keeps count."""

from __future__ import annotations

import logging
from typing import Literal, Protocol

log = logging.getLogger(__name__)

Phase = Literal["prefill", "decode"]


class Orchestrator(Protocol):
    """Raises PeerLost when it cannot be reached, ConfigError when it does not know the workload or must not."""

    async def replicas(self, phase: Phase) -> int:
        """Workers that are asked for."""

    async def scale(self, phase: Phase, replicas: int) -> None:
        """Asks for so many. Who goes is told to drain first."""


class DryRun:
    """Reads from `inner`, changes nothing, says what it would do."""

    def __init__(self, inner: Orchestrator) -> None:
        self._inner = inner

    async def replicas(self, phase: Phase) -> int:
        return await self._inner.replicas(phase)

    async def scale(self, phase: Phase, replicas: int) -> None:
        log.info("dry run: %s would be scaled to %d", phase, replicas)
