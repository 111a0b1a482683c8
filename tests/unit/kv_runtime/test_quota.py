"""Tenants in one pool: what each may have, and whose blocks go."""

from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import KvConfig, TenantConfig
from sagellm_common.core.errors import KvExhausted, TenantQuota
from sagellm_common.core.types import TokenIds
from sagellm_common.kv_runtime.backends.mock import MockKvPool
from sagellm_common.kv_runtime.pool import PoolAllocation
from sagellm_common.kv_runtime.quota import CLAIM_TTL_S, RETRY_AFTER_S
from tests.support.kv_channels import a_layout

LAYOUT = a_layout(block_bytes=16, block_size_tokens=1)
TENANTS = {"gold": TenantConfig(guaranteed=0.5), "small": TenantConfig(limit=0.3)}


class World:
    """A pool of ten blocks of one token. Each prompt is new unless it is named."""

    def __init__(self, tenants: dict[str, TenantConfig] = TENANTS) -> None:
        self.clock = ManualClock()
        self.pool = MockKvPool(LAYOUT, 10, tenants=tenants, clock=self.clock)
        self._next = 0

    def take(self, tenant: str, count: int) -> PoolAllocation:
        return self.pool.allocate(self.prompt(count), count, tenant=tenant)

    def cache(self, tenant: str, count: int) -> None:
        prompt = self.prompt(count)
        allocation = self.pool.allocate(prompt, count, tenant=tenant)
        self.pool.publish(allocation, prompt)
        self.pool.free(allocation)

    def prompt(self, count: int) -> TokenIds:
        self._next += 1000
        return np.arange(self._next, self._next + count, dtype=np.int32)

    def charged(self) -> dict[str, int]:
        return {usage.tenant: usage.charged_blocks for usage in self.pool.tenant_usage()}


def test_idle_blocks_are_borrowed_and_counted_as_such() -> None:
    world = World()
    held = world.take("anyone", 10)
    usage = {usage.tenant: usage for usage in world.pool.tenant_usage()}
    assert (usage["default"].charged_blocks, usage["default"].borrowed_blocks) == (10, 10)
    assert (usage["gold"].guaranteed_blocks, usage["gold"].limit_blocks, usage["small"].limit_blocks) == (5, 10, 3)
    world.pool.free(held)
    assert world.charged() == {"default": 0, "gold": 0, "small": 0}


def test_a_limit_is_kept_and_the_tenants_own_cached_blocks_make_way() -> None:
    world = World()
    world.cache("small", 2)
    held = world.take("small", 2)
    assert world.charged()["small"] == 3
    with pytest.raises(TenantQuota, match="tenant 'small' wants 2 more KV blocks and has 3, .* its limit") as caught:
        world.take("small", 2)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    assert caught.value.metadata == {"tenant": "small"}
    assert len(world.pool.cached_hashes()) == 1  # what was refused took nothing
    world.pool.free(held)
    assert {usage.tenant: usage.rejections for usage in world.pool.tenant_usage()}["small"] == 1


def test_an_owner_takes_back_cached_blocks_of_borrowers_at_once() -> None:
    world = World()
    world.cache("anyone", 8)
    world.cache("gold", 2)
    world.take("gold", 3)
    assert world.charged() == {"default": 5, "gold": 5, "small": 0}


def test_an_owner_that_waits_for_borrowed_blocks_keeps_others_from_borrowing_more() -> None:
    world = World()
    borrowed = [world.take("anyone", 2) for _ in range(5)]
    with pytest.raises(KvExhausted):
        world.take("gold", 4)
    for allocation in borrowed[:1]:
        world.pool.free(allocation)
    with pytest.raises(TenantQuota, match="while 'gold' waits for its own"):
        world.take("anyone", 1)
    world.pool.free(borrowed[1])
    assert len(world.take("gold", 4).block_ids) == 4
    world.pool.free(borrowed[2])
    world.take("anyone", 1)  # gold has what it asked for


def test_an_owner_that_does_not_ask_again_is_not_waited_for() -> None:
    world = World()
    borrowed = [world.take("anyone", 5), world.take("anyone", 5)]
    with pytest.raises(KvExhausted):
        world.take("gold", 1)
    world.pool.free(borrowed[0])
    world.clock.advance(CLAIM_TTL_S)
    world.take("anyone", 1)


def test_beyond_its_guarantee_a_tenant_is_told_that_nothing_is_idle() -> None:
    world = World()
    world.take("gold", 8)
    world.take("anyone", 2)
    with pytest.raises(TenantQuota, match="no block is idle that it could borrow"):
        world.take("gold", 1)


def test_cached_blocks_within_a_guarantee_go_last_but_do_not_keep_work_from_running() -> None:
    world = World()
    world.cache("gold", 4)
    world.cache("anyone", 4)
    world.take("anyone", 6)
    assert world.charged() == {"default": 6, "gold": 4, "small": 0}
    world.take("anyone", 2)
    assert world.charged() == {"default": 8, "gold": 2, "small": 0}


def test_without_tenants_nobody_is_asked() -> None:
    world = World({})
    assert world.pool.tenant_usage() == []
    world.take("anyone", 10)
    with pytest.raises(KvExhausted):
        world.take("gold", 1)


def test_shares_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up to 1.2"):
        KvConfig(tenants={"a": TenantConfig(guaranteed=0.6), "b": TenantConfig(guaranteed=0.6)})
    with pytest.raises(ValueError, match=r"guaranteed 0\.6 is beyond limit 0\.5"):
        TenantConfig(guaranteed=0.6, limit=0.5)
