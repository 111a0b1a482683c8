"""What the autoscaler sees of a real router with scripted workers."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import generate_latest

from sagellm_common.client.router import RouterClient
from sagellm_common.core.errors import ConfigError, PeerLost
from services.autoscaler.observe import Observer
from tests.support.router_harness import router_harness


async def test_it_sees_requests_workers_and_learned_costs() -> None:
    async with router_harness(strategy="hybrid") as harness:
        await harness.pair()

        def page(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=generate_latest(harness.registry))

        async with (
            httpx.AsyncClient(transport=httpx.MockTransport(page)) as http,
            RouterClient(harness.router.address) as router,
        ):
            observer = Observer(router, http, ["127.0.0.1:1"], max_batch=8)
            before = await observer.look()
            done = await harness.generate()
            after = await observer.look()
        assert (before.prefill_ready, before.decode_ready) == (1, 1)
        (grown,) = (after.counters[r].since(before.counters[r]) for r in after.counters)
        assert (grown.requests, grown.rejected) == (1, 0)
        assert grown.prompt_tokens == done.summary.prompt_tokens
        assert grown.generated_tokens == len(done.tokens)
        assert after.limits.max_batch == 8
        assert observer.costs.prefill.samples >= 1, "as the router has learned it"


async def test_no_router_that_tells_its_metrics_is_an_error_and_so_is_a_bad_name() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with (
        router_harness() as harness,
        RouterClient(harness.router.address) as router,
        httpx.AsyncClient(transport=httpx.MockTransport(gone)) as http,
    ):
        with pytest.raises(PeerLost, match=r"no router tells its metrics at 127\.0\.0\.1:1"):
            await Observer(router, http, ["127.0.0.1:1"], 8).look()
        with pytest.raises(ConfigError, match=r"autoscaler\.routers: 'router' is no host:port"):
            await Observer(router, http, ["router"], 8).look()
