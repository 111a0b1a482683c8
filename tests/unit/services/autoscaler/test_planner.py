"""How many workers a load needs, and when that changes."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.autoscaler.capacity import Targets, WorkerLimits, flip_s, largest_batch, needed, prefill_workers
from services.autoscaler.demand import Counters, Demand, Window, demand_of
from services.autoscaler.planner import Fleet, Planner

LIMITS = WorkerLimits(max_batch=64, kv_tokens=1 << 20)
TARGETS = Targets(ttft_s=0.5, tpot_s=0.03)


def learned() -> CostModel:
    """Prefill of 10 ms and 0.1 ms per token; steps of 5 ms, 0.2 ms per sequence and 1 µs per token of context."""
    costs = CostModel()
    for tokens in range(100, 2100, 100):
        costs.observe_prefill([(0, tokens)], 0.01 + 1e-4 * tokens)
    for batch in (*range(1, 20), 24, 32, 48, 64, 80, 96):
        for context in (100, 1000, 4000):
            costs.observe_decode(batch, batch * context, 5e-3 + 2e-4 * batch + 1e-6 * batch * context)
    return costs


def demand(rate: float, prompt: float = 1000, cached: float = 0, output: float = 100) -> Demand:
    return Demand(rate, prompt, prompt - cached, output)


def planner(costs: CostModel | None = None, *, flips: bool = False, **config: Any) -> Planner:
    settings: dict[str, Any] = {"interval_s": 10, "startup_s": 20, "scale_down_after_s": 50, "max_prefill": 50}
    settings |= {"max_decode": 50, **config}
    known = costs or learned()
    return Planner(AutoscalerConfig(**settings), lambda: known, TARGETS, LIMITS, flips=flips)


def fleet(prefill: int = 1, decode: int = 1) -> Fleet:
    return Fleet(prefill, decode, prefill, decode)


def simulated_late(servers: int, rate: float, service_s: float, patience_s: float) -> float:
    """Share that waits longer than that in a queue with exponential times between arrivals and exponential services."""
    rng, free, late, now = random.Random(1), [0.0] * servers, 0, 0.0
    for _ in range(60_000):
        now += rng.expovariate(rate)
        first = min(range(servers), key=free.__getitem__)
        begin = max(now, free[first])
        late += begin - now > patience_s
        free[first] = begin + rng.expovariate(1 / service_s)
    return late / 60_000


@pytest.mark.parametrize(("rate", "service_s", "ttft_s"), [(9.0, 0.11, 0.5), (30.0, 0.2, 0.5), (3.0, 0.4, 0.45)])
def test_prefill_workers_are_as_few_as_a_simulated_queue_allows(rate: float, service_s: float, ttft_s: float) -> None:
    servers = prefill_workers(rate, service_s, ttft_s)
    assert simulated_late(servers, rate, service_s, ttft_s - service_s) <= 0.12
    if servers > rate * service_s + 1:
        assert simulated_late(servers - 1, rate, service_s, ttft_s - service_s) > 0.08


def test_the_batch_is_the_largest_within_the_target_the_slots_and_the_memory() -> None:
    costs = learned()
    free = largest_batch(costs, 1000, 0.03, LIMITS)
    step_s = costs.decode_s(free, free * 1000).seconds
    assert step_s <= 0.03 < costs.decode_s(free + 1, (free + 1) * 1000).seconds
    assert largest_batch(costs, 1000, 0.03, WorkerLimits(8, 1 << 20)) == 8
    assert largest_batch(costs, 1000, 0.03, WorkerLimits(64, 5_500)) == 5
    assert largest_batch(costs, 1000, 0.001, LIMITS) == 0


def test_decode_workers_hold_what_is_alive() -> None:
    need = needed(demand(20, output=100), learned(), TARGETS, LIMITS)
    assert need.sequences == pytest.approx(20 * 100 * need.tpot_s)
    assert need.decode == math.ceil((need.sequences + 1.65 * math.sqrt(need.sequences)) / need.batch)
    assert need.feasible


def test_a_cache_saves_prefill_workers() -> None:
    cold, warm = (needed(demand(40, 2000, cached), learned(), TARGETS, LIMITS) for cached in (0, 1600))
    assert warm.prefill < cold.prefill
    assert warm.decode == cold.decode


def test_what_no_worker_can_do_is_said() -> None:
    need = needed(demand(1, 8000), learned(), TARGETS, LIMITS)
    assert not need.feasible
    found = planner().plan(demand(1, 8000), fleet())
    assert "more workers do not help" in found.reason


def test_without_costs_one_worker_learns_them() -> None:
    found = planner(CostModel()).plan(demand(50), fleet())
    assert (found.prefill, found.decode) == (1, 1)


def test_more_load_brings_more_workers_at_once_and_less_load_fewer_after_a_while() -> None:
    plans = planner()
    assert plans.plan(demand(2), fleet()).prefill == 1
    high = plans.plan(demand(60), fleet())
    assert high.prefill >= 7
    low = [plans.plan(demand(2), fleet(high.prefill, high.decode)) for _ in range(25)]
    assert low[0].prefill >= high.prefill, "not yet"
    assert low[-1].prefill <= 2
    assert "was needed within the last 50 s" in low[1].reason


def test_a_rising_load_is_met_before_it_is_there() -> None:
    plans = planner(forecast_sigmas=0)
    for i in range(20):
        found = plans.plan(demand(5.0 + 3 * i), fleet())
    assert found.expected.requests_per_s > found.demand.requests_per_s + 2


def test_limits_and_budget_hold_and_what_is_beyond_them_is_said() -> None:
    found = planner(max_prefill=3).plan(demand(60), fleet())
    assert found.prefill == 3
    assert found.rejected_share > 0.4
    assert "beyond them" in found.reason
    both = planner(max_workers=6).plan(demand(60, output=400), fleet())
    assert both.prefill + both.decode == 6
    assert min(both.prefill, both.decode) >= 1


def test_a_role_is_changed_where_one_phase_has_too_many() -> None:
    found = planner(flips=True).plan(demand(40, output=5), Fleet(2, 6, 2, 6))
    assert found.prefill > 2
    assert found.decode < 6
    assert found.flips == min(found.prefill - 2, 6 - found.decode)
    assert planner().plan(demand(40, output=5), Fleet(2, 6, 2, 6)).flips == 0


def test_a_change_of_roles_costs_what_runs_there() -> None:
    costs = learned()
    load, limits = demand(40, output=50), WorkerLimits(64, 1 << 20, kv_bytes_per_token=1000)
    need = needed(load, costs, TARGETS, limits)
    assert flip_s(True, 0, load, need, costs, limits) == 0
    assert flip_s(True, 4, load, need, costs, limits) == pytest.approx(50 * need.tpot_s), "they end there"
    for megabytes in range(1, 20):
        costs.observe_transfer("p", "d", megabytes << 20, megabytes * 0.01)
    assert flip_s(True, 4, load, need, costs, limits) == pytest.approx(4 * 1025 * 1000 / (1 << 20) * 0.01, rel=0.05)
    assert flip_s(False, 4, load, need, costs, limits) == pytest.approx(4 * need.prefill_s)


def test_a_change_of_roles_that_takes_longer_than_a_start_is_only_for_want_of_others() -> None:
    busy = Fleet(2, 6, 2, 6, decode_requests=20)
    slow = {"startup_s": 0.001, "flips": True}
    assert planner(**slow).plan(demand(40, output=200), busy).flips == 0
    assert planner(**slow, max_workers=8).plan(demand(40, output=5), busy).flips > 0
    assert planner(**slow).plan(demand(40, output=5), replace(busy, fixed=True)).flips > 0


def test_counters_of_routers_that_come_and_go() -> None:
    window = Window()
    assert window.take({"a": Counters(100, prompt_tokens=1e4)}) == Counters()
    grown = window.take({"a": Counters(110, 2, 12_000, 500, 300, in_flight=3), "b": Counters(7, in_flight=1)})
    assert grown == Counters(10, 2, 2000, 500, 300, in_flight=4)
    assert window.take({"a": Counters(4, 0, 100, 0, 10)}).requests == 4, "it was restarted"
    assert window.take({"a": Counters(4, 0, 100, 0, 10), "b": Counters(9)}).requests == 2, "it was away for a while"


def test_demand_counts_rejections_as_load_and_keeps_lengths_while_nothing_finishes() -> None:
    found = demand_of(Counters(30, 10, 20_000, 5_000, 1_000, 4), 10.0, None)
    assert found == Demand(3.0, 1000.0, 750.0, 50.0, in_flight=4)
    assert demand_of(Counters(requests=5, rejected=5), 10.0, found) == Demand(0.5, 1000.0, 750.0, 50.0)
    assert demand_of(Counters(), 10.0, None) == Demand(0.0, 0.0, 0.0, 0.0)
