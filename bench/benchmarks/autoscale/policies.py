"""Who says how many workers there are: ours, one that knows the future, one by utilisation, and a fixed number."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from bench.sim.scaling import Decide, Seen
from bench.sim.traces import SimRequest
from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.autoscaler.capacity import Targets, WorkerLimits, needed
from services.autoscaler.demand import Counters, Demand, demand_of
from services.autoscaler.pace import Pace
from services.autoscaler.planner import Fleet, Planner

HPA_TARGET = 0.6
HPA_TOLERANCE = 0.1
HPA_STABILIZATION_S = 300.0
"""Of a HorizontalPodAutoscaler: its defaults, and a utilisation that leaves room for bursts."""


def ours(config: AutoscalerConfig, costs: Callable[[], CostModel], targets: Targets, limits: WorkerLimits) -> Decide:
    """The autoscaler's own planner, with its cool-down."""
    planner = Planner(config, costs, targets, limits)
    pace = Pace(config.cooldown_s)
    demand: Demand | None = None

    def decide(seen: Seen) -> tuple[int, int]:
        nonlocal demand
        counted = Counters(seen.requests, 0, seen.prompt_tokens, seen.hit_tokens, seen.output_tokens)
        demand = demand_of(counted, config.interval_s, demand)
        fleet = Fleet(seen.asked["prefill"], seen.asked["decode"], seen.ready["prefill"], seen.ready["decode"])
        decision = planner.plan(demand, fleet)
        prefill, decode = decision.prefill, decision.decode
        if pace.waits(fleet, seen.now_s):
            prefill, decode = max(prefill, fleet.prefill), max(decode, fleet.decode)
        if (prefill, decode) != (fleet.prefill, fleet.decode):
            pace.changed(seen.now_s)
        return prefill, decode

    return decide


def oracle(
    config: AutoscalerConfig,
    costs: Callable[[], CostModel],
    targets: Targets,
    limits: WorkerLimits,
    requests: Sequence[SimRequest],
) -> Decide:
    """What each interval until new workers serve will really ask for, by the same arithmetic; what caches hold is as
    last seen."""
    ahead = math.ceil(config.startup_s / config.interval_s) + 1
    bins = _bins(requests, config.interval_s)
    hit_share = 0.0

    def decide(seen: Seen) -> tuple[int, int]:
        nonlocal hit_share
        if seen.prompt_tokens:
            hit_share = seen.hit_tokens / seen.prompt_tokens
        first = round(seen.now_s / config.interval_s)
        prefill, decode = config.min_prefill, config.min_decode
        for one in bins[first : first + ahead]:
            if one:
                prompt = sum(r.prompt_tokens for r in one) / len(one)
                output = sum(r.output_tokens for r in one) / len(one)
                demand = Demand(len(one) / config.interval_s, prompt, prompt * (1 - hit_share), output)
                need = needed(demand, costs(), targets, limits)
                prefill, decode = max(prefill, need.prefill), max(decode, need.decode)
        return min(prefill, config.max_prefill), min(decode, config.max_decode)

    return decide


def by_utilisation(config: AutoscalerConfig) -> Decide:
    """A HorizontalPodAutoscaler on each phase: ready pods times how busy they were, over the target."""
    kept = max(1, math.ceil(HPA_STABILIZATION_S / config.interval_s))
    wanted: dict[str, deque[int]] = {phase: deque(maxlen=kept) for phase in ("prefill", "decode")}
    limits = {
        "prefill": (config.min_prefill, config.max_prefill),
        "decode": (config.min_decode, config.max_decode),
    }

    def decide(seen: Seen) -> tuple[int, int]:
        found = []
        for phase, recent in wanted.items():
            ready = max(1, seen.ready[phase])
            ratio = seen.busy_s[phase] / (ready * config.interval_s) / HPA_TARGET
            now = ready if abs(ratio - 1) <= HPA_TOLERANCE else math.ceil(ready * ratio)
            recent.append(now)
            lowest, highest = limits[phase]
            found.append(min(max(max(recent) if now < seen.asked[phase] else now, lowest), highest))
        return found[0], found[1]

    return decide


def fixed(prefill: int, decode: int) -> Decide:
    return lambda _: (prefill, decode)


def _bins(requests: Sequence[SimRequest], interval_s: float) -> list[list[SimRequest]]:
    bins: list[list[SimRequest]] = [[] for _ in range(int(requests[-1].arrival_s / interval_s) + 1)]
    for request in requests:
        bins[int(request.arrival_s / interval_s)].append(request)
    return bins
