"""Does it pay, on 1P1D clusters of real processes that take turns: deciding per request, never, and always.

Load `short` are short prompts one after the other: to hand them over costs more than it saves. Load `long` are prompts
that come while others decode: computed on their worker they hold those up. The costs are learned in both, before.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.paired import Estimate, estimate
from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome

MODES = ("never", "auto", "always")
REQUEST_TIMEOUT_S = 300.0
SHORT_TOKENS, LONG_TOKENS = 24, 400
WARM_UP = 30

Progress = Callable[[str], None]
Round = Mapping[str, float]
"""By load, mean seconds from sending a request to its last token."""


@asynccontextmanager
async def a_cluster(mode: str, model: Path, scratch: Path) -> AsyncIterator[Cluster]:
    config = Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": f"pd-{mode}"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": 1024, "max_prefill_tokens": 512, "prefix_caching": False},
            "kv_store": {"enabled": False},
            "router": {"strategy": "slo_aware", "disaggregate": mode},
        }
    )
    home = ClusterHome(config.cluster.name, scratch)
    with home.owned():
        cluster = Cluster(config, home)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()


async def one(client: AsyncClient, rng: np.random.Generator, tokens: int, new_tokens: int) -> tuple[float, list[int]]:
    """Seconds, and what was generated."""
    prompt = rng.integers(5, 250, size=tokens).tolist()
    began = time.perf_counter()
    done = await client.complete(prompt, max_tokens=new_tokens, ignore_eos=True)
    return time.perf_counter() - began, list(done.token_ids)


async def short(client: AsyncClient, seed: int) -> tuple[float, list[list[int]]]:
    rng = np.random.default_rng(seed)
    done = [await one(client, rng, SHORT_TOKENS, 8) for _ in range(12)]
    return statistics.mean(seconds for seconds, _ in done), [tokens for _, tokens in done]


async def long(client: AsyncClient, seed: int) -> tuple[float, list[list[int]]]:
    rng = np.random.default_rng(seed)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(client, rng, SHORT_TOKENS, 96)) for _ in range(6)]
        for _ in range(6):
            await asyncio.sleep(0.05)
            tasks.append(group.create_task(one(client, rng, LONG_TOKENS, 4)))
    done = [task.result() for task in tasks]
    return statistics.mean(seconds for seconds, _ in done), [tokens for _, tokens in done]


LOADS = {"short": short, "long": long}


async def measure(model: Path, turns: int, scratch: Path, progress: Progress) -> dict[str, object]:
    """By load and mode, each turn's mean seconds; how many were disaggregated, and regret. Raises what a request fails
    with, and AssertionError where tokens depend on the mode."""
    taken: dict[str, dict[str, list[float]]] = {load: {mode: [] for mode in MODES} for load in LOADS}
    async with AsyncExitStack() as stack:
        clusters: dict[str, Cluster] = {}
        clients: dict[str, AsyncClient] = {}
        for mode in MODES:
            progress(f"starting 1P1D, disaggregate {mode}")
            clusters[mode] = await stack.enter_async_context(a_cluster(mode, model, scratch))
            client = AsyncClient(clusters[mode].router_address, timeout_s=REQUEST_TIMEOUT_S)
            clients[mode] = await stack.enter_async_context(client)
            for n in range(WARM_UP):
                await one(client, np.random.default_rng(n), 20 + 13 * n, 4)
            for load in LOADS.values():
                await load(client, 1000)
        for turn in range(turns):
            for name, load in LOADS.items():
                tokens = {}
                for mode in (*MODES[turn % 3 :], *MODES[: turn % 3]):
                    seconds, tokens[mode] = await load(clients[mode], turn)
                    taken[name][mode].append(seconds)
                assert tokens["never"] == tokens["auto"] == tokens["always"], "the same tokens either way"
            progress(f"turn {turn + 1} of {turns}")
        counters = {mode: await _counters(clusters[mode]) for mode in MODES}
    return {"seconds": taken, "counters": counters}


async def _counters(cluster: Cluster) -> dict[str, float]:
    address = next(p.metrics_address for p in cluster.state().processes if p.id == "router")
    async with httpx.AsyncClient(trust_env=False) as http:
        page = await http.get(f"http://{address}/metrics")
    found = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            name = sample.name.removeprefix("sagellm_router_").removesuffix("_total")
            if name.startswith("separation") and name != sample.name and sample.name.endswith("_total"):
                found[" ".join([name, *sample.labels.values()])] = sample.value
    return found


def ratios(taken: Mapping[str, list[float]], mode: str) -> Estimate:
    """To `never`, turn by turn: what the machine did meanwhile is in both."""
    return estimate([a / b for a, b in zip(taken[mode], taken["never"], strict=True)])
