"""What each policy is known for, on traces where it shows."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from bench.benchmarks.kv.families import zipf
from bench.benchmarks.kv.replay import ceiling, replay
from sagellm_common.core.config import Eviction
from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.eviction import EVICTION, make_eviction
from sagellm_common.kv_policy.eviction.adaptive import Adaptive
from sagellm_common.kv_policy.eviction.cost_aware import CostAware
from sagellm_common.kv_policy.eviction.frequency import Gdsf


def hit_rate(name: str, trace: list[list[int]], capacity: int) -> float:
    return replay(trace, capacity, make_eviction(name, capacity), clock=lambda: 0).hit_rate


def documents_and_chats(requests: int = 1500, seed: int = 0) -> list[list[int]]:
    """40 documents of 20 blocks that are asked about again and again, among prompts that never come again."""
    rng, trace, fresh = random.Random(seed), [], 1_000_000
    for _ in range(requests):
        if rng.random() < 0.4:
            first = 100 * rng.randrange(40)
            trace.append([*range(first, first + 20), fresh])
            fresh += 1
        else:
            trace.append(list(range(fresh, fresh + 12)))
            fresh += 12
    return trace


def test_lru_gives_up_the_end_of_the_oldest_path_first() -> None:
    policy = make_eviction("lru", 4)
    policy.access("abc")
    policy.access("de")
    assert policy.evict(2) == ["c", "b"]
    assert policy.evict(2, keep={"a"}) == ["e", "d"]


def test_lfu_keeps_what_is_used_often() -> None:
    policy = make_eviction("lfu", 4)
    for _ in range(3):
        policy.access("a")
    policy.access("b")
    assert policy.evict(1) == ["b"]


def test_gdsf_prefers_what_is_dear_to_compute_and_ages() -> None:
    policy: Gdsf[str] = Gdsf(4, cost=lambda depth: 10.0 if depth else 1.0)
    policy.access("ab")
    policy.access("c")
    assert policy.evict(2) == ["a", "c"]
    policy.access("d")  # on top of the age that the victims left
    assert policy.evict(1) == ["d"]


@pytest.mark.parametrize("name", ["arc", "s3-fifo", "cost-aware"])
def test_a_scan_does_not_flush_what_is_used(name: str) -> None:
    trace = documents_and_chats()
    assert hit_rate(name, trace, 400) > 1.15 * hit_rate("lru", trace, 400)


def test_cost_aware_learns_what_comes_again() -> None:
    trace = documents_and_chats()
    rate = hit_rate("cost-aware", trace, 400)
    assert rate > max(hit_rate(name, trace, 400) for name in ("lru", "lfu", "arc", "s3-fifo", "gdsf"))
    assert rate < ceiling(trace)
    policy: CostAware[int] = CostAware(400)
    replay(trace, 400, policy, clock=lambda: 0)  # type: ignore[arg-type]
    assert policy.lifetimes.skill > 0.5


def test_cost_aware_minds_the_cost() -> None:
    policy: CostAware[str] = CostAware(4, cost=lambda depth: 1.0)
    policy.access("a")
    policy.access("b")
    assert policy.evict(1) == ["a"], "nothing is known yet: the least recently used goes"
    dear: CostAware[str] = CostAware(4, cost=lambda depth: 100.0 if depth == 1 else 1.0)
    dear.access("xy")
    dear.access("z")
    assert dear.evict(1) == ["z"], "y is dear, and x is kept for it"


@pytest.mark.parametrize("removed", ["x", "y"])
def test_a_parent_that_waits_for_its_child_is_freed_once_either_is_removed(removed: str) -> None:
    policy: CostAware[str] = CostAware(4, cost=lambda depth: 100.0 if depth else 1.0)
    policy.access("xy")
    policy.access("z")
    assert policy.evict(1, keep={"y"}) == ["z"], "x was to go first, and waits for y"
    policy.remove(removed)
    assert policy.evict(2) == [{"x": "y", "y": "x"}[removed]]
    assert len(policy) == 0


def test_a_parent_goes_before_its_child_only_where_nothing_else_can() -> None:
    policy: CostAware[str] = CostAware(4)
    policy.access("xy")
    assert policy.evict(2, keep={"y"}) == ["x"]
    assert policy.evict(2) == ["y"]


@pytest.mark.parametrize("name", sorted(EVICTION))
def test_blocks_in_use_for_long_cost_nothing_per_eviction(name: str) -> None:
    """1000 blocks are in use throughout, and nothing is as old: they are not asked about at each eviction."""

    class InUse(frozenset[int]):
        asked = 0

        def __contains__(self, block: object) -> bool:
            self.asked += 1
            return super().__contains__(block)

    policy, in_use = make_eviction(name, 1100), InUse(range(1000))
    policy.access(range(1000))
    for block in range(2000, 6000):
        policy.access([block])
        if len(policy) > 1100:
            assert len(policy.evict(1, in_use)) == 1
    assert in_use.asked < 5 * 4000
    assert len(policy) == 1100
    assert set(policy) >= set(range(1000))
    assert len(policy.evict(1100)) == 1100, "they can go once nobody uses them"


def test_adaptive_takes_to_another_order_where_that_surely_hits_more() -> None:
    trace = zipf(random.Random(1), 800)
    policy: Adaptive[int] = Adaptive(150)
    rate = replay(trace, 150, policy, clock=lambda: 0).hit_rate
    assert policy.order == "uses", "popularity is what counts here, and a few hundred uses tell it"
    assert rate > 1.1 * hit_rate("cost-aware", trace, 150)
    assert len(policy) == 150


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown eviction policy 'mru'; known: adaptive, arc, cost-aware, gdsf"):
        make_eviction("mru", 4)


def test_the_configuration_knows_all_policies() -> None:
    assert set(get_args(Eviction)) == set(EVICTION)
