"""Two routers over one etcd, the same workers, no state between them: each serves, and either may be killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import httpx

from sagellm_common.client.aio import AsyncClient
from sagellm_common.client.router import RouterClient, Tokens
from services.cli.cluster import child_env
from services.cli.process import ServiceProcess
from tests.support.checks import SETTLE_TIMEOUT_S, eventually
from tests.support.cluster import RunningCluster
from tests.support.etcd import etcd_cluster
from tests.support.oracle import greedy

START_S = 60.0
PROMPT = list(range(5, 45))
TOKENS = 48


@asynccontextmanager
async def service(cluster: RunningCluster, name: str, *argv: str) -> AsyncIterator[str]:
    """One more process of the cluster; its address."""
    command = [sys.executable, "-m", f"services.{name}", "--config", str(cluster.home.config_file), *argv]
    process = await ServiceProcess.start(command, child_env(), cluster.home.log_file(f"second-{name}"))
    try:
        yield (await process.ready(START_S)).address
    finally:
        await process.stop(5.0)


async def test_a_router_is_killed_and_the_other_goes_on(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as etcd:
        settings = ("topology.backend=etcd", f"topology.endpoints={etcd.endpoints[0]}", "kv_store.enabled=false")
        with RunningCluster(*settings, "rpc.tokens=direct") as cluster:
            expected = greedy(Path(cluster.model_path), PROMPT, TOKENS)
            async with AsyncExitStack() as stack:
                second = await stack.enter_async_context(service(cluster, "router", "--port", "0"))
                both = f"{cluster.router_address},{second}"
                gateway = await stack.enter_async_context(service(cluster, "gateway", "--port", "0", "--router", both))
                alone = await stack.enter_async_context(RouterClient(second))

                async def seen_by_the_second() -> int:
                    return len([w for w in (await alone.topology()).workers if w.kv is not None])

                await eventually(seen_by_the_second, lambda count: count == 2, START_S)
                how: tuple[Tokens, ...] = ("direct", "relayed")
                clients = [
                    await stack.enter_async_context(AsyncClient(address, tokens=tokens))
                    for address in (cluster.router_address, second)
                    for tokens in how
                ]
                answers = await asyncio.gather(*(generated(client) for client in clients * 2))
                assert answers == [expected] * len(answers)

                direct = await stack.enter_async_context(AsyncClient(both, tokens="direct"))
                relayed = await stack.enter_async_context(AsyncClient(both, tokens="relayed"))
                got: list[int] = []
                async with aclosing(direct.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)) as outputs:
                    async for output in outputs:
                        got += output.token_ids
                        if len(got) == 5:
                            await asyncio.to_thread(cluster.kill, "router")
                assert got == expected, "the router was on no token's way"
                assert await generated(direct) == expected
                assert await generated(relayed) == expected
                async with httpx.AsyncClient(trust_env=False, timeout=START_S) as http:
                    asked = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
                    answer = await http.post(f"http://{gateway}/v1/completions", json=asked)
                assert answer.json()["usage"]["completion_tokens"] == TOKENS, answer.text

                async def held() -> list[int]:
                    workers = (await alone.topology()).workers
                    return [w.kv.used_blocks + w.reservations + w.pinned_transfers for w in workers if w.kv is not None]

                await eventually(held, lambda found: found == [0, 0], SETTLE_TIMEOUT_S)


async def generated(client: AsyncClient) -> list[int]:
    done = await client.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    return list(done.token_ids)
