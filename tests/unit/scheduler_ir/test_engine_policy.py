"""Order, victims, prefill or decode; plans over policies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest

from sagellm_common.scheduler_ir.engine_policy import (
    AGING_S,
    EngineLoad,
    EnginePolicy,
    Order,
    PlannedPolicy,
    RankedPolicy,
    SequenceView,
    StepPlan,
)

FIRST = SequenceView("first", arrival=0, priority=0, deadline_s=9.0)
URGENT = SequenceView("urgent", arrival=1, priority=2, deadline_s=8.0)
SOON = SequenceView("soon", arrival=2, priority=0, deadline_s=1.0)
ALL = [URGENT, SOON, FIRST]


def ids(views: list[SequenceView]) -> list[str]:
    return [view.request_id for view in views]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("fifo", ["first", "urgent", "soon"]),
        ("priority", ["urgent", "first", "soon"]),
        ("deadline", ["urgent", "soon", "first"]),
        ("feasible", ["urgent", "soon", "first"]),
        ("aging", ["urgent", "first", "soon"]),
    ],
)
def test_the_last_to_start_is_the_first_victim(order: Order, expected: list[str]) -> None:
    policy = RankedPolicy(order)
    assert ids(policy.order_waiting(ALL)) == expected
    assert ids(policy.order_victims(ALL)) == expected[::-1]


def test_who_waits_long_enough_goes_before_who_is_more_urgent() -> None:
    old = SequenceView("old", arrival=0, arrived_s=10.0)
    views = [SequenceView(f"urgent {i}", arrival=1 + i, priority=2, arrived_s=10.5 + i) for i in range(4)]
    ordered = ids(RankedPolicy("aging").order_waiting([*views, old]))
    # Two levels are worth two seconds of waiting: the urgent ones of 10.5 and 11.5 go first, that of 12.5 does not.
    assert ordered == ["urgent 0", "urgent 1", "old", "urgent 2", "urgent 3"]
    assert AGING_S == 1.0


def test_who_is_late_anyway_goes_last() -> None:
    policy = RankedPolicy("feasible")
    assert ids(policy.order_waiting(ALL, now_s=8.5)) == ["first", "urgent", "soon"]
    long = replace(FIRST, needed_s=1.0)
    assert ids(policy.order_waiting([URGENT, SOON, long], now_s=7.5)) == ["urgent", "first", "soon"]
    assert ids(policy.order_waiting([URGENT, SOON, long], now_s=8.01)) == ["urgent", "soon", "first"]


def test_handed_over_kv_that_is_dear_to_recompute_goes_last() -> None:
    policy = RankedPolicy(cheap_recompute_tokens=100)
    cheap = SequenceView("cheap", arrival=3, computed_tokens=100, handed_over=True)
    dear = SequenceView("dear", arrival=4, priority=-1, computed_tokens=101, handed_over=True)
    own = SequenceView("own", arrival=5, computed_tokens=1000)
    assert ids(policy.order_victims([dear, cheap, own, URGENT])) == ["own", "cheap", "urgent", "dear"]


def test_a_budget_lets_who_runs_decode_between_prompts() -> None:
    def load(decode_steps: int, num_running: int = 1) -> EngineLoad:
        return EngineLoad(3, num_running, last_prefill_tokens=100, decode_steps=decode_steps)

    bounded = RankedPolicy(prefill_tokens_per_decode_step=30)
    assert [bounded.prefill_next(load(steps)) for steps in (0, 3, 4)] == [False, False, True]
    assert bounded.prefill_next(load(0, num_running=0))
    assert RankedPolicy().prefill_next(load(0))


def test_a_plan_goes_first_and_leaves_the_rest_to_the_policy() -> None:
    def planned(**plan: object) -> EnginePolicy:
        return PlannedPolicy(StepPlan(**plan), RankedPolicy())  # type: ignore[arg-type]

    assert ids(planned(start=("soon", "gone")).order_waiting(ALL)) == ["soon", "urgent", "first"]
    assert ids(planned(start=("soon",)).order_victims(ALL)) == ["soon", "first", "urgent"]
    assert ids(planned(give_way=("urgent",)).order_victims(ALL)) == ["urgent", "soon", "first"]
    load = EngineLoad(1, 0)
    assert [planned(prefill=choice).prefill_next(load) for choice in (True, False, None)] == [True, False, True]
    with pytest.raises(ValueError, match=r"StepPlan\.start names a request twice"):
        StepPlan(start=("a", "a"))


def _urgent(name: str, deadline_s: float, needed_s: float) -> SequenceView:
    return SequenceView(name, int(name[1:]), deadline_s=deadline_s, needed_s=needed_s)


@pytest.mark.parametrize("seed", range(20))
def test_on_time_first_leaves_as_few_late_as_any_order(seed: int) -> None:
    rng = random.Random(seed)
    views = [_urgent(f"s{i}", rng.uniform(0, 10), rng.uniform(0.1, 4)) for i in range(6)]

    def in_time(order: Sequence[SequenceView]) -> int:
        end_s, count = 1.0, 0
        for view in order:
            end_s += view.needed_s
            count += end_s <= view.deadline_s
        return count

    ordered = RankedPolicy(order="on_time").order_waiting(views, now_s=1.0)
    assert sorted(view.request_id for view in ordered) == sorted(view.request_id for view in views)
    assert in_time(ordered) == max(in_time(order) for order in permutations(views))


def test_who_is_late_anyway_waits_the_quickest_first() -> None:
    views = [_urgent("s0", 1.0, 9.0), _urgent("s1", 1.0, 5.0), _urgent("s2", 30.0, 2.0)]
    ordered = RankedPolicy(order="on_time").order_waiting(views, now_s=0.0)
    assert [view.request_id for view in ordered] == ["s2", "s1", "s0"]
