"""Where blocks go when they are evicted from a tier, and when they are used in a slow one."""

from __future__ import annotations

import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.migration import MIN_COPIES, BlockFacts, ByCost, ByUses, Decision, Move


def test_by_uses() -> None:
    policy = ByUses(3, demote_uses=2, promote_on_use=3)
    assert policy.on_evict(BlockFacts(tier=0, uses=1)) == Decision(Move.DROP)
    assert policy.on_evict(BlockFacts(tier=0, uses=2)) == Decision(Move.DEMOTE, 1)
    assert policy.on_evict(BlockFacts(tier=1, uses=2)) == Decision(Move.DEMOTE, 2)
    assert policy.on_evict(BlockFacts(tier=2, uses=9)) == Decision(Move.DROP), "there is nothing below"
    assert policy.on_use(BlockFacts(tier=2, uses=2)) == Decision(Move.KEEP)
    assert policy.on_use(BlockFacts(tier=2, uses=3)) == Decision(Move.PROMOTE, 0)
    assert policy.on_use(BlockFacts(tier=0, uses=3)) == Decision(Move.KEEP), "there is nothing above"


@pytest.mark.parametrize(
    "wrong", [{"num_tiers": 0}, {"num_tiers": 2, "demote_uses": 0}, {"num_tiers": 2, "promote_on_use": 0}]
)
def test_wrong_numbers_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        ByUses(**wrong)


MS, MB = 1e-3, 1 << 20
DOWN, UP = (Decision(Move.DEMOTE, 1), Decision(Move.PROMOTE, 0))


def by_cost(**ms_per_mb: float) -> ByCost:
    """Of three tiers; `write_1=2.0` is what a megabyte takes to tier 1, `read_1` back from it."""
    policy = ByCost(3)
    for way, ms in ms_per_mb.items():
        tier = int(way[-1])
        source, target = (0, tier) if way.startswith("write") else (tier, 0)
        for size in range(1, MIN_COPIES + 1):
            policy.copied(source, target, size * MB, size * ms * MS)
    return policy


def block(tier: int = 0, uses: int = 1, recompute_ms: float | None = None) -> BlockFacts:
    recompute_s = None if recompute_ms is None else recompute_ms * MS
    return BlockFacts(tier, uses, num_bytes=MB, recompute_s=recompute_s)


def test_by_cost_tries_what_it_does_not_know() -> None:
    assert ByCost(3).on_evict(block(recompute_ms=1.0)) == DOWN
    assert by_cost(write_1=2.0).on_evict(block()) == DOWN
    assert ByCost(3).on_use(block(1, recompute_ms=1.0)) == UP
    assert by_cost(read_1=2.0).on_use(block(1)) == UP
    assert ByCost(1).on_evict(block()) == Decision(Move.DROP), "there is nothing below"
    assert ByCost(1).on_use(block()) == Decision(Move.KEEP), "there is nothing above"


def test_a_block_goes_down_where_that_spares_more_than_it_takes() -> None:
    """Half of the new blocks are used again, as far as is known: it takes 2 + half of (recompute - 2) ms."""
    policy = by_cost(write_1=2.0, read_1=2.0, write_2=2.0, read_2=30.0)
    assert policy.on_evict(block(recompute_ms=5.0)) == Decision(Move.DROP)
    assert policy.on_evict(block(recompute_ms=7.0)) == DOWN
    assert policy.on_use(block(1, recompute_ms=1.0)) == Decision(Move.KEEP)
    assert policy.on_use(block(1, recompute_ms=3.0)) == UP


def test_it_goes_to_the_tier_where_it_is_worth_most() -> None:
    policy = by_cost(write_1=9.0, read_1=9.0, write_2=1.0, read_2=4.0)
    assert policy.on_evict(block(recompute_ms=100.0)) == Decision(Move.DEMOTE, 2)
    assert by_cost(write_1=2.0, write_2=9.0).on_evict(block(recompute_ms=100.0)) == DOWN, "reads as writes so far"


def test_what_was_used_often_is_worth_more() -> None:
    policy = by_cost(write_1=2.0, read_1=2.0, write_2=9.0, read_2=9.0)
    for n in range(1000):
        policy.came(1)
        if n % 10 == 0:
            policy.came(2)
            for uses in range(3, 8):
                policy.came(uses)
    chances = [policy.reuse_probability(uses) for uses in (1, 2, 3, 4, 100)]
    assert chances[0] == pytest.approx(0.1, abs=0.02)
    assert min(chances[1:]) > 0.7
    assert policy.on_evict(block(uses=1, recompute_ms=12.0)) == Decision(Move.DROP)
    assert policy.on_evict(block(uses=2, recompute_ms=12.0)) == DOWN, "it goes at its second use"


def test_old_counts_fade() -> None:
    policy = ByCost(2)
    for uses, count in ((1, 3 * policy.MEMORY_BLOCKS), (2, 3 * policy.MEMORY_BLOCKS)):
        for _ in range(count):
            policy.came(uses)
    assert policy.reuse_probability(1) > 0.9


def test_a_refusal_is_not_for_ever() -> None:
    policy = by_cost(write_1=2.0, read_1=2.0, write_2=2.0, read_2=2.0)
    moves = [policy.on_evict(block(recompute_ms=0.1)).move for _ in range(2 * policy.RETRY_EVERY)]
    assert moves.count(Move.DEMOTE) == 2
    moves = [policy.on_use(block(1, recompute_ms=0.1)).move for _ in range(2 * policy.RETRY_EVERY)]
    assert moves.count(Move.PROMOTE) == 2


def test_no_tiers() -> None:
    with pytest.raises(ConfigError, match="num_tiers is 0"):
        ByCost(0)
