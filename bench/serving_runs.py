"""The ways a prompt takes in `bench.serving`: an engine in this process, the cluster through gRPC, and through HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from sagellm_common.core.types import GenerationSummary, SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import EngineRequest, SequenceOutput
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome

REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it. Times in ms; TPOT is the mean after the first token, ITL the median gap.

    Of `ttft_ms`, `engine_first_ms` passed in the engine that made the first token; of each later token's `tpot_ms`,
    `engine_step_ms` in the engine that made it and `transfer_ms` (all of it spread over them) with KV on its way and
    nothing else to do. 0: not told, as through HTTP.
    """

    ttft_ms: float
    tpot_ms: float
    itl_ms: float
    tokens: int
    summary: GenerationSummary | None = None
    engine_first_ms: float = 0.0
    engine_step_ms: float = 0.0
    transfer_ms: float = 0.0


Run = Callable[[list[int], int], Any]


def sample(arrivals: list[float], start: float, summary: GenerationSummary | None = None) -> Sample:
    gaps = [1e3 * (b - a) for a, b in itertools.pairwise(arrivals)]
    found = Sample(1e3 * (arrivals[0] - start), statistics.mean(gaps), statistics.median(gaps), len(arrivals), summary)
    if summary is None:
        return found
    return replace(
        found,
        engine_first_ms=summary.prefill_engine_ms,
        engine_step_ms=summary.decode_engine_ms / len(gaps),
        transfer_ms=min(summary.transfer_ms, summary.transfer_exposed_ms) / len(gaps),
    )


@asynccontextmanager
async def single_engine(config: Config) -> AsyncIterator[Run]:
    engine = make_engine(config)
    queues: dict[str, asyncio.Queue[SequenceOutput]] = {}

    def on_step(outputs: Any) -> None:
        for output in outputs:
            queues[output.request_id].put_nowait(output)

    async def run(prompt: list[int], new_tokens: int) -> Sample:
        request_id = f"bench-{len(queues)}"
        queue = queues[request_id] = asyncio.Queue()
        start, arrivals, took_s = time.perf_counter(), [], []
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        engine.submit(EngineRequest(request_id, as_token_ids(prompt), params))
        while True:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                output = await queue.get()
            arrivals += [time.perf_counter()] * len(output.token_ids)
            took_s.append(output.engine_s)
            if output.finish_reason:
                first_s, *steps_s = took_s
                return replace(
                    sample(arrivals, start),
                    engine_first_ms=1e3 * first_s,
                    engine_step_ms=1e3 * statistics.mean(steps_s),
                )

    await engine.start(on_step)
    try:
        yield run
    finally:
        await engine.close()


def over_grpc(client: AsyncClient) -> Run:
    async def run(prompt: list[int], new_tokens: int) -> Sample:
        start, arrivals, summary = time.perf_counter(), [], None
        async for output in client.generate(prompt, max_tokens=new_tokens, ignore_eos=True):
            arrivals += [time.perf_counter()] * len(output.token_ids)
            summary = output.summary or summary
        return sample(arrivals, start, summary)

    return run


def over_http(client: httpx.AsyncClient, model: str) -> Run:
    async def run(prompt: list[int], new_tokens: int) -> Sample:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            # Tokens are counted by usage: a chunk may carry several, half a character waits for its other half.
            arrivals, tokens = [], 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if chunk["choices"] and chunk["choices"][0]["finish_reason"] is None:
                        arrivals.append(time.perf_counter())
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        return replace(
            sample(arrivals, start), tokens=tokens, tpot_ms=1e3 * (arrivals[-1] - arrivals[0]) / (tokens - 1)
        )

    return run


async def burst(run: Run, prompts: list[list[int]], new_tokens: int, concurrency: int) -> tuple[list[Sample], float]:
    """All prompts with at most `concurrency` in flight; samples and tokens per second."""
    gate, start = asyncio.Semaphore(concurrency), time.perf_counter()

    async def one(prompt: list[int]) -> Sample:
        async with gate:
            return await run(prompt, new_tokens)

    samples = await asyncio.gather(*(one(p) for p in prompts))
    return samples, sum(s.tokens for s in samples) / (time.perf_counter() - start)


@asynccontextmanager
async def engine_and_cluster(config: Config) -> AsyncIterator[tuple[Run, Cluster]]:
    """A bare engine in this process, and a 1P1D cluster with the same model."""
    with tempfile.TemporaryDirectory() as scratch, ClusterHome("bench", Path(scratch)).owned():
        cluster = Cluster(config, ClusterHome("bench", Path(scratch)))
        try:
            async with single_engine(config) as engine:
                await cluster.start()
                yield engine, cluster
        finally:
            await cluster.stop()


def config_of(model: Path) -> Config:
    return Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": "bench"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": 1024, "threads": 1},
            "kv_store": {"enabled": False},
        }
    )
