"""Strategies of classes, changed while the router serves; and its queue, over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest

from sagellm_common.core.errors import InvalidRequest, QueueFull
from sagellm_common.rpc.gen.sagellm.v1 import topology_pb2
from sagellm_common.rpc.status import from_rpc_error
from tests.support.router_harness import PATIENCE_S, RouterHarness, router_harness
from tests.support.waiting import eventually

CLASSES = {"chat": {"strategy": "slo_aware", "ttft_target_ms": 500, "priority": 3}, "bulk": {"priority": -3}}


async def set_strategy(router: RouterHarness, strategy: str = "", service_class: str = "") -> Sequence[tuple[str, ...]]:
    request = topology_pb2.SetStrategyRequest(strategy=strategy, service_class=service_class)
    try:
        reply = await router.topology_stub.SetStrategy(request, timeout=PATIENCE_S)
    except grpc.aio.AioRpcError as err:
        raise from_rpc_error(err) from err
    return [(one.service_class, one.strategy, one.engine_policy, str(one.placed_requests)) for one in reply.classes]


async def test_a_class_has_its_own_strategy_targets_and_priority() -> None:
    async with router_harness(classes=CLASSES, ttft_target_ms=100) as router:
        prefill, _ = await router.pair()
        plans = [(await router.generate(request_id=name, service_class=name)).plan for name in ("chat", "bulk")]
        assert [plan.strategy for plan in plans] == ["slo_aware", "fifo"]
        told = {request.request_id: request for request in prefill.requests}
        assert {name: request.priority for name, request in told.items()} == {"chat": 3, "bulk": -3}
        assert 100 < told["chat"].first_token_within_ms <= 500
        assert not told["bulk"].HasField("first_token_within_ms")  # fifo knows no targets
        with pytest.raises(InvalidRequest, match="'nobody' is unknown; known: chat, bulk"):
            await router.generate(service_class="nobody")


async def test_strategies_change_from_one_request_to_the_next() -> None:
    async with router_harness(classes=CLASSES) as router:
        await router.pair()
        await router.generate(request_id="before")
        assert await set_strategy(router) == [("", "fifo", "fifo", "1"), ("chat", "slo_aware", "feasible", "0")]
        assert (await set_strategy(router, "hybrid"))[0] == ("", "hybrid", "on_time", "0")
        assert ("bulk", "adaptive", "on_time", "0") in await set_strategy(router, "adaptive", "bulk")
        plans = [(await router.generate(request_id=f"after {name}", service_class=name)).plan for name in ("", "bulk")]
        assert [plan.strategy for plan in plans] == ["hybrid", "adaptive"]
        for strategy, service_class, why in (("lifo", "", "known: adaptive"), ("fifo", "x", "known: chat, bulk")):
            with pytest.raises(InvalidRequest, match=why):
                await set_strategy(router, strategy, service_class)


async def test_costs_are_learned_from_when_a_strategy_asks_for_them() -> None:
    async with router_harness() as router:
        await router.pair()
        await router.generate(request_id="before")
        assert router.metric("sagellm_router_cost_samples_total", part="prefill") == 0
        await set_strategy(router, "hybrid")
        await router.generate(request_id="after")
        assert router.metric("sagellm_router_cost_samples_total", part="prefill") == 1


async def test_who_waits_in_the_router_goes_by_priority_and_a_full_one_says_when_to_come_again() -> None:
    async with router_harness(strategy="priority", max_queue=3, max_running=1) as router:
        prefill, _ = await router.pair()
        gate = asyncio.Event()
        prefill.on("prefill", gate.wait)
        running = asyncio.create_task(router.generate(request_id="running"))
        async with asyncio.timeout(PATIENCE_S):
            await prefill.reached["prefill"].wait()
        waiting = [asyncio.create_task(router.generate(request_id=f"p{p}", priority=p)) for p in (0, 9)]
        await eventually(lambda: router.metric("sagellm_router_waiting_requests") == 2)
        assert len(prefill.requests) == 1, "the workers know nothing of those who wait"
        with pytest.raises(QueueFull) as full:
            await router.generate(request_id="one too many")
        assert full.value.retry_after_s is not None and full.value.retry_after_s > 0
        urgent = asyncio.create_task(router.generate(request_id="p5", priority=5))
        with pytest.raises(QueueFull, match="another came before"):
            await waiting[0]
        gate.set()
        await asyncio.gather(running, waiting[1], urgent)
        assert [request.request_id for request in prefill.requests] == ["running", "p9", "p5"]
        await router.assert_nothing_held()
