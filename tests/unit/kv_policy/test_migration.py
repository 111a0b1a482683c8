"""Where blocks go when they are evicted from a tier, and when they are used in a slow one."""

from __future__ import annotations

import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.migration import BlockFacts, ByUses, Decision, Move


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
