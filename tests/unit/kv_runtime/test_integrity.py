from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.types import TokenIds
from sagellm_common.kv_policy.lifetime import LifetimePredictor
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.mock import MockKvPool
from sagellm_common.kv_runtime.integrity import SelfCheck, check
from tests.support.kv_channels import a_layout

LAYOUT = a_layout(block_bytes=16, block_size_tokens=2)


def tokens(count: int) -> TokenIds:
    return np.arange(count, dtype=np.int32)


def make() -> MockKvPool:
    """Three blocks cached, two of them held, and one more."""
    pool = MockKvPool(LAYOUT, 8, tenants={"acme": TenantConfig(guaranteed=0.5)})
    allocation = pool.allocate(tokens(6), 6)
    pool.publish(allocation, tokens(6))
    pool.free(allocation)
    pool.allocate(tokens(5), 6, tenant="acme")
    return pool


def test_a_pool_in_use_is_well() -> None:
    pool = make()
    report = check(pool, pool.cached_hashes())
    assert (report.problems, report.sampled_blocks, report.corrupt) == ((), 3, ())
    assert pool.get_utilization().balanced


def test_a_reference_that_nobody_has_is_found() -> None:
    pool = make()
    pool.blocks.ref_counts[pool.cache.blocks()[0]] += 1
    (problem,) = check(pool).problems
    assert problem.startswith("1 blocks have other reference counts than holders")


def test_a_lost_block_is_found() -> None:
    pool = make()
    pool.blocks.allocate(1)
    assert len(check(pool).problems) == 2  # the totals, and the references


def test_a_cache_that_names_another_block_is_found() -> None:
    pool = make()
    one, two, _ = pool.cache.hashes()
    pool.cache[one].block = pool.cache[two].block
    assert any("the cache finds 3 hashes in 3 blocks, 1 of them not" in p for p in check(pool).problems)


def test_a_cached_block_that_has_changed_is_dropped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    pool = make()
    self_check = SelfCheck(pool, sample_blocks=2)
    for _ in range(2):  # reads all three, in turn
        assert self_check.run().problems == ()
    last = pool.cache.hashes()[-1]
    pool.regions().block(int(pool.blocks.slots(pool.cache.blocks_of([last]))[0]))[:] = b"x" * 16
    with caplog.at_level(logging.ERROR):
        reports = [self_check.run() for _ in range(2)]
    assert reports[0].problems == ()
    assert reports[1].corrupt == (last,)
    assert last not in pool.cached_hashes()
    assert "1 of 1 cached blocks are not what they were" in caplog.text
    assert check(pool).problems == ()
    health = self_check.health()
    assert (health.checks, health.failed_checks, health.sampled_blocks, health.corrupt_blocks) == (4, 1, 6, 1)
    assert [usage.tenant for usage in health.tenants] == ["default", "acme"]


def test_a_pool_without_memory_has_nothing_to_check() -> None:
    self_check = SelfCheck(HostKvPool(1 << 20, ManualClock()))
    assert self_check.run().problems == ()
    assert self_check.health().checks == 0


def test_reading_a_sample_is_no_use_of_it() -> None:
    pool = make()
    seen: list[object] = []
    pool.cache.policy.access = seen.append  # type: ignore[method-assign, assignment]
    check(pool, pool.cached_hashes())
    assert seen == []


def test_names_that_were_others_are_counted() -> None:
    """As when two different blocks have one name."""
    pool, asked = make(), tokens(5)
    key = pool.cache[pool.cached_hashes()[0]].key
    pool.cache[key.hash].key = replace(key, token_bytes=bytes(len(key.token_bytes)))
    assert pool.allocate(asked, len(asked)).num_cached_tokens == 0
    assert SelfCheck(pool).health().rejected_hits == 1


def test_how_well_eviction_foretells_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LifetimePredictor, "skill", 0.25)
    pool = MockKvPool(LAYOUT, 8, eviction="adaptive")
    assert SelfCheck(pool).health().lifetime_skill == 0.25
    pool.set_eviction("lru")
    assert SelfCheck(pool).health().lifetime_skill == 0.0
