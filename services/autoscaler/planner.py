"""From what is asked for to how many workers there should be: pure, so the simulator runs the very same object.

demand ──► forecast at the time new workers would serve ──► need ──► within limits, budget, cool-down ──► Decision
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.autoscaler.capacity import Need, Targets, WorkerLimits, flip_s, needed
from services.autoscaler.demand import Demand
from services.autoscaler.forecast import Forecast


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers of each phase: asked for, and serving. `*_requests` are on the least busy one. `fixed`: there are no more
    and no fewer, but they may change their roles."""

    prefill: int
    decode: int
    prefill_ready: int
    decode_ready: int
    prefill_requests: int = 0
    decode_requests: int = 0
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What there should be, and why. `flips` > 0: so many decode workers become prefill workers, < 0: the reverse; they
    are part of `prefill` and `decode`. `rejected_share`: of the load, beyond all that may be had."""

    prefill: int
    decode: int
    flips: int
    rejected_share: float
    demand: Demand
    expected: Demand
    need: Need
    reason: str

    def changes(self, fleet: Fleet) -> bool:
        return (self.prefill, self.decode) != (fleet.prefill, fleet.decode)


def _most(wanted: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(prefill for prefill, _ in wanted), max(decode for _, decode in wanted)


class Planner:
    """Call `plan` once per interval. `flips` says whether workers can change their role while they run.

    For each phase it is: more workers, the other phase's, fewer of them, or more load than all that may be had.
    """

    def __init__(
        self,
        config: AutoscalerConfig,
        costs: Callable[[], CostModel],
        targets: Targets,
        limits: WorkerLimits,
        *,
        flips: bool = False,
    ) -> None:
        self._config = config
        self._costs = costs
        self._targets = targets
        self.limits = limits
        """Of a decode worker; as last seen."""
        self._flips = flips
        horizon = max(1, math.ceil(config.startup_s / config.interval_s) + 1)
        season = round(config.season_s / config.interval_s)
        names = ("requests_per_s", "prompt_tokens", "computed_tokens", "output_tokens")
        self.forecasts = {name: Forecast(horizon, season) for name in names}
        """Of the fields of a Demand."""
        kept = max(1, math.ceil(config.scale_down_after_s / config.interval_s))
        self._wanted: deque[tuple[int, int]] = deque(maxlen=kept)
        """Of the last intervals: fewer workers only when none of them wanted more."""
        self._brief = max(1, math.ceil(config.cooldown_s / config.interval_s))
        """Intervals after which a worker may change its role for good: that is undone as soon as it is done."""

    def plan(self, demand: Demand, fleet: Fleet) -> Decision:
        config = self._config
        expected = self._expect(demand)
        need, now = (needed(of, self._costs(), self._targets, self.limits) for of in (expected, demand))
        # Load that has come counts as it is, whatever the forecast says.
        wanted = max(need.prefill, now.prefill), max(need.decode, now.decode)
        self._wanted.append(wanted)
        recent = [*self._wanted]
        held, brief = _most(recent), _most(recent[-self._brief :])
        if fleet.fixed:
            prefill, decode = self._within_budget(*self._bounded(*brief), fleet.prefill + fleet.decode)
        else:
            prefill, decode = self._within_budget(*self._bounded(*held), config.max_workers)
        flips, of_flips = 0, ""
        if self._flips:
            flips, of_flips = self._flipped(prefill, decode, self._bounded(*brief), fleet, expected, need)
        if fleet.fixed:
            prefill, decode = fleet.prefill + flips, fleet.decode - flips
        elif flips > 0:
            decode = min(decode, fleet.decode - flips)
        elif flips < 0:
            prefill = min(prefill, fleet.prefill + flips)
        rejected = max(0.0, 1 - min(prefill / wanted[0], decode / wanted[1]))
        reason = self._reason(wanted, held, (prefill, decode), need, rejected) + of_flips
        return Decision(prefill, decode, flips, rejected, demand, expected, need, reason)

    def _expect(self, demand: Demand) -> Demand:
        for name, forecast in self.forecasts.items():
            if name == "requests_per_s" or demand.prompt_tokens > 0:  # else nothing is known of lengths yet
                forecast.observe(getattr(demand, name))
        ahead = {name: forecast.predict() for name, forecast in self.forecasts.items()}
        prompt = ahead["prompt_tokens"].value
        return replace(
            demand,
            requests_per_s=ahead["requests_per_s"].upper(self._config.forecast_sigmas),
            prompt_tokens=prompt,
            computed_tokens=min(prompt, ahead["computed_tokens"].value),
            output_tokens=ahead["output_tokens"].value,
        )

    def _bounded(self, prefill: int, decode: int) -> tuple[int, int]:
        config = self._config
        return (
            min(max(prefill, config.min_prefill), config.max_prefill),
            min(max(decode, config.min_decode), config.max_decode),
        )

    def _within_budget(self, prefill: int, decode: int, most: int) -> tuple[int, int]:
        """Both cut alike where together they are more than may be had; 0: any."""
        if not most or prefill + decode <= most:
            return prefill, decode
        share = most / (prefill + decode)
        prefill = min(max(self._config.min_prefill, round(prefill * share)), most - self._config.min_decode)
        return prefill, max(self._config.min_decode, most - prefill)

    def _flipped(
        self, prefill: int, decode: int, keep: tuple[int, int], fleet: Fleet, demand: Demand, need: Need
    ) -> tuple[int, str]:
        """(flips, why): the phase that lacks workers takes what the other need not `keep`, where that is done sooner
        than a new worker serves, or where there is none to be had."""
        if prefill > fleet.prefill:
            count = min(prefill - fleet.prefill, fleet.decode - min(decode, keep[1]))
            giver, requests = "decode", fleet.decode_requests
        else:
            count = min(decode - fleet.decode, fleet.prefill - min(prefill, keep[0]))
            giver, requests = "prefill", fleet.prefill_requests
        config = self._config
        if count <= 0 or (fleet.fixed and fleet.prefill + fleet.decode < config.min_prefill + config.min_decode):
            return 0, ""
        took_s = flip_s(giver == "decode", requests, demand, need, self._costs(), self.limits)
        full = config.max_workers and max(prefill, fleet.prefill) + max(decode, fleet.decode) > config.max_workers
        if not (fleet.fixed or full) and took_s >= config.startup_s:
            return 0, f"; a change of roles takes {took_s:.1f} s, a new worker serves after {config.startup_s:g} s"
        why = f"; {giver} gives {count} to the other phase, which takes {took_s:.1f} s"
        return (count if giver == "decode" else -count), why

    def _reason(
        self, wanted: tuple[int, int], held: tuple[int, int], chosen: tuple[int, int], need: Need, rejected: float
    ) -> str:
        parts = [
            f"{need.prefill_s * 1e3:.0f} ms of prefill per request, {need.sequences:.1f} sequences alive at "
            f"{need.batch} a worker and {need.tpot_s * 1e3:.1f} ms per token: {wanted[0]}P{wanted[1]}D"
        ]
        if not need.feasible:
            parts.append("one request alone is beyond the targets: more workers do not help it")
        if held != wanted:
            parts.append(f"{held[0]}P{held[1]}D was needed within the last {self._config.scale_down_after_s:g} s")
        if chosen != held:
            parts.append(f"within the limits {chosen[0]}P{chosen[1]}D")
        if rejected > 0:
            parts.append(f"{rejected:.0%} of the load is beyond them and will be turned away or late")
        return "; ".join(parts)
