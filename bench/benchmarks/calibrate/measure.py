"""A real cluster under a workload: what its clients saw of each request, and what its engines' steps took."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.sim.traces import SimRequest
from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.types import GenerationSummary
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.worker_client import WorkerStatus, get_status, watch_status
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome

REQUEST_TIMEOUT_S = 300.0
STATUS_TIMEOUT_S = 5.0
WATCH_S = 0.02
LAST_STEPS_S = 10 * WATCH_S
"""After the last token: its step is told by then."""
VOCABULARY = 40_000


@dataclass(frozen=True, slots=True)
class Served:
    """One request as its client saw it. `tpot_s` is the mean gap after the first token, `first_gap_s` the first of
    these, `later_gap_s` their median."""

    request: SimRequest
    ttft_s: float
    tpot_s: float
    first_gap_s: float
    later_gap_s: float
    summary: GenerationSummary


@dataclass(slots=True)
class RealCluster:
    """`steps` grows while it serves."""

    client: AsyncClient
    workers: tuple[WorkerStatus, ...]
    steps: list[StepCost] = field(default_factory=list)

    async def serve(self, requests: Sequence[SimRequest], seed: int) -> list[Served]:
        """Sends each when it is due, whatever became of those before. Random prompts: no cache helps."""
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(100, VOCABULARY, size=request.prompt_tokens).tolist() for request in requests]
        began_s = time.perf_counter()

        async def one(request: SimRequest, prompt: list[int]) -> Served:
            due_s = began_s + request.arrival_s
            await asyncio.sleep(due_s - time.perf_counter())
            return await _generate(self.client, request, prompt, due_s)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*pair)) for pair in zip(requests, prompts, strict=True)]
        await asyncio.sleep(LAST_STEPS_S)
        return [task.result() for task in tasks]


async def _generate(client: AsyncClient, request: SimRequest, prompt: list[int], due_s: float) -> Served:
    arrivals: list[float] = []
    summary: GenerationSummary | None = None
    outputs = client.generate(prompt, max_tokens=request.output_tokens, ignore_eos=True)
    async with aclosing(outputs):
        async for output in outputs:
            arrivals += [time.perf_counter()] * len(output.token_ids)
            summary = output.summary or summary
    assert summary is not None, "the last output has a summary"
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    if not gaps:
        return Served(request, arrivals[0] - due_s, 0.0, 0.0, 0.0, summary)
    later_s = statistics.median(gaps[1:] or gaps)
    return Served(request, arrivals[0] - due_s, statistics.mean(gaps), gaps[0], later_s, summary)


@asynccontextmanager
async def real_cluster(config: Config, num_prefill: int, num_decode: int) -> AsyncIterator[RealCluster]:
    """Serves for the time of the block. Raises ConfigError, StartFailed."""
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        home = ClusterHome("calibrate", Path(scratch))
        stack.enter_context(home.owned())
        cluster = Cluster(config, home, num_prefill, num_decode)
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        channels = await stack.enter_async_context(ChannelPool())
        addresses = [member.ready.address for member in cluster.workers if member.ready is not None]
        statuses = [await get_status(channels.get(address), timeout_s=STATUS_TIMEOUT_S) for address in addresses]
        client = await stack.enter_async_context(AsyncClient(cluster.router_address, timeout_s=REQUEST_TIMEOUT_S))
        real = RealCluster(client, tuple(statuses))

        async def follow(address: str) -> None:
            watch = watch_status(channels.get(address), min_interval_s=WATCH_S)
            async with aclosing(watch) as updates:
                async for status, _ in updates:
                    real.steps.extend(status.steps)

        watches = [asyncio.create_task(follow(address)) for address in addresses]
        try:
            yield real
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
