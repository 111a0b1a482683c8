"""How often the numbers of workers may change: more at once, fewer with care."""

from __future__ import annotations

import math

from services.autoscaler.planner import Fleet


class Pace:
    """Fewer workers only a while after the last change, and when what was asked for before is there."""

    def __init__(self, cooldown_s: float) -> None:
        self._cooldown_s = cooldown_s
        self._changed_s = -math.inf

    def waits(self, fleet: Fleet, now_s: float) -> str:
        """Why there may not be fewer workers now; empty: there may."""
        if now_s - self._changed_s < self._cooldown_s:
            return "cooling down"
        if fleet.prefill_ready < fleet.prefill or fleet.decode_ready < fleet.decode:
            return "workers are still starting"
        return ""

    def changed(self, now_s: float) -> None:
        self._changed_s = now_s
