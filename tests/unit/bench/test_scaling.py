"""Workers that come and go in simulation: who is paid for, and nobody's request is lost."""

from __future__ import annotations

import math

import pytest

from bench.sim.cluster import Slo
from bench.sim.profile import PROFILES
from bench.sim.scaling import Decide, ScaledCluster, Seen
from bench.sim.traces import generated
from sagellm_common.scheduler_ir.strategies import make_strategy

REQUESTS = generated(400, 10.0, seed=3, prompt_tokens=2000, output_tokens=200)
END_S = REQUESTS[-1].arrival_s


def run(decide: Decide, start: tuple[int, int], startup_s: float = 5.0) -> tuple[ScaledCluster, list[float]]:
    cluster = ScaledCluster(
        PROFILES.get("h200-8b"),
        *start,
        lambda costs: make_strategy("hybrid", costs),
        Slo(2.0, 0.05),
        decide=decide,
        interval_s=5.0,
        startup_s=startup_s,
        until_s=END_S,
    )
    outcome = cluster.run(REQUESTS)
    cluster.settle(outcome.end_s)
    assert len(outcome.jobs) == len(REQUESTS)
    return cluster, [job.end_s for job in outcome.jobs]


def test_a_fixed_cluster_pays_for_all_of_it_all_the_time() -> None:
    cluster, ends = run(lambda _: (2, 3), (2, 3))
    assert not any(map(math.isnan, ends))
    assert cluster.gpu_seconds == pytest.approx(5 * cluster.clock.now_s)


def test_workers_that_come_and_go_lose_nothing_and_cost_less() -> None:
    looks: list[Seen] = []

    def decide(seen: Seen) -> tuple[int, int]:
        looks.append(seen)
        return (4, 5) if len(looks) % 4 < 2 else (1, 1)

    cluster, ends = run(decide, (1, 1))
    assert not any(map(math.isnan, ends)), "what a leaving worker had is finished"
    assert 2 * cluster.clock.now_s < cluster.gpu_seconds < 9 * cluster.clock.now_s
    assert sum(seen.requests for seen in looks) == sum(r.arrival_s < looks[-1].now_s for r in REQUESTS)
    assert max(seen.ready["decode"] for seen in looks) == 5


def test_one_that_is_given_up_while_it_starts_never_serves() -> None:
    looks: list[Seen] = []

    def decide(seen: Seen) -> tuple[int, int]:
        looks.append(seen)
        return (1, 3) if len(looks) == 1 else (1, 1)

    cluster, _ = run(decide, (1, 1), startup_s=12.0)
    assert all(seen.ready["decode"] == 1 for seen in looks)
    assert cluster.gpu_seconds == pytest.approx(2 * cluster.clock.now_s + 2 * 5.0)


def test_of_many_workers_those_are_asked_that_came_and_not_those_that_left() -> None:
    """More than a strategy is shown: the idlest of those that are there."""
    sizes = iter([(20, 20), (20, 20), (20, 20), (2, 20), (2, 20), (20, 2)])
    last = (2, 2)

    def decide(_: Seen) -> tuple[int, int]:
        nonlocal last
        last = next(sizes, last)
        return last

    cluster, ends = run(decide, (1, 1))
    assert not any(map(math.isnan, ends))
    jobs = cluster._outcome.jobs
    assert len({job.prefill_worker for job in jobs}) > 16 and len({job.decode_worker for job in jobs}) > 16
