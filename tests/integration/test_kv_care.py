"""Shares by tenant and the pool's self-check, over real gRPC; only the engine is simulated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import TenantQuota
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import SamplingParams, WorkerRole, as_token_ids
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.worker_client import get_status
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import Worker, generate, request, test_config, worker

PROMPT = list(range(1, 15))
TENANTS = {"small": TenantConfig(limit=0.05)}
"""Three of the simulated pool's 64 blocks."""


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@pytest.fixture
async def prefill(router: str) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL, router) as made:
        yield made


@pytest.fixture
async def decode(router: str) -> AsyncIterator[Worker]:
    config = test_config("kv.self_check_s=0.05")
    async with worker(WorkerRole.DECODE, router, config=config, engine=SimulatedEngine(tenants=TENANTS)) as made:
        yield made


async def test_a_tenant_at_its_limit_is_refused_and_others_are_not(prefill: Worker, decode: Worker) -> None:
    small = replace(request(PROMPT), tenant="small")
    with pytest.raises(TenantQuota, match="tenant 'small' wants 4 more KV blocks") as caught:
        await generate(prefill, decode, small)
    assert caught.value.retry_after_s
    assert caught.value.metadata["tenant"] == "small"
    others = await generate(prefill, decode, request(PROMPT, request_id="r2"))
    assert others.tokens == reference(PROMPT, SamplingParams(8))[0]
    fitting = replace(request(PROMPT[:5], 4, request_id="r3"), tenant="small")
    assert (await generate(prefill, decode, fitting)).tokens == reference(PROMPT[:5], SamplingParams(4))[0]
    (usage,) = [usage for usage in decode.runtime.kv_health().tenants if usage.tenant == "small"]
    assert usage.rejections == 1
    assert 0 < usage.charged_blocks <= usage.limit_blocks == 3
    await decode.idle()
    blocks = decode.runtime._metrics.get_sample_value
    assert blocks("sagellm_worker_tenant_kv_blocks", {"tenant": "small", "kind": "limit"}) == 3
    assert blocks("sagellm_worker_tenant_rejections_total", {"tenant": "small"}) == 1


async def test_an_idle_worker_checks_its_pool_and_tells_what_it_found(decode: Worker) -> None:
    pool = decode.engine.kv
    prompt = as_token_ids(PROMPT)
    allocation = pool.allocate(prompt, len(prompt))
    pool.publish(allocation, prompt)
    pool.free(allocation)
    async with ChannelPool() as channels:
        channel = channels.get(decode.runtime.record.address)
        await eventually(lambda: decode.runtime.kv_health().sampled_blocks >= 3, lambda: "no sample was read")
        assert (await get_status(channel, timeout_s=TIMEOUT_S)).kv_health.failed_checks == 0
        pool.regions().block(int(allocation.block_ids[0]))[:4] = b"lost"
        await eventually(lambda: decode.runtime.kv_health().corrupt_blocks == 1, lambda: "the change was not seen")
        told = (await get_status(channel, timeout_s=TIMEOUT_S)).kv_health
    assert told.corrupt_blocks == 1
    assert told.failed_checks >= 1
    assert len(pool.cached_hashes()) == 2
    await eventually(lambda: decode.runtime.kv_health().problems == (), lambda: "it is not well again")
