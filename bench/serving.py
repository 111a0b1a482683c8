"""One LMDeploy engine in process, the 1P1D cluster through gRPC, and through HTTP, interleaved in one run.

    python -m bench.serving [--quick] [--prompt-tokens 256] [--new-tokens 32] [--out bench/results/serving.json]

All three use the same model, the same prompts' lengths and one torch thread per engine. The cluster has two engines on
the machine's cores, the single engine one; read the columns as what a user sees, not as equal hardware. Prompts are
random token ids, so no cache helps anybody. The single engine and the clients run on uvloop, as the cluster's processes
and the synchronous SDK do.

What the gRPC path adds to one request is measured apart, request by request in turns with the bare engine (`paired`),
with SmolLM2 and with a tiny model whose steps are too short to hide it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.paired import Estimate, added, estimate, in_turns
from bench.plots import grouped_bars
from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from sagellm_common.core.types import GenerationSummary, SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import EngineRequest, SequenceOutput
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome
from services.cli.models import cache_home, prepare_smollm2, prepare_tiny

PATHS = ("engine", "grpc", "http")
REQUEST_TIMEOUT_S = 300.0
TARGETS = {"added_ttft_ms": 3.0, "added_ms_per_token": 0.3}
"""Of what the gRPC path adds to one request alone."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it. Times in ms; TPOT is the mean after the first token, ITL the median gap."""

    ttft_ms: float
    tpot_ms: float
    itl_ms: float
    tokens: int
    summary: GenerationSummary | None = None


Run = Callable[[list[int], int], Any]


def sample(arrivals: list[float], start: float, summary: GenerationSummary | None = None) -> Sample:
    gaps = [1e3 * (b - a) for a, b in itertools.pairwise(arrivals)]
    return Sample(1e3 * (arrivals[0] - start), statistics.mean(gaps), statistics.median(gaps), len(arrivals), summary)


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
        start, arrivals = time.perf_counter(), []
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        engine.submit(EngineRequest(request_id, as_token_ids(prompt), params))
        while True:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                output = await queue.get()
            arrivals += [time.perf_counter()] * len(output.token_ids)
            if output.finish_reason:
                return sample(arrivals, start)

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


async def idle_round_trip_ms(address: str) -> float:
    """Median of an empty gRPC call after a pause: what a round trip costs at least while nothing is warm."""
    times = []
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(20):
            await asyncio.sleep(0.1)
            start = time.perf_counter()
            await health.Check(health_pb2.HealthCheckRequest(), timeout=REQUEST_TIMEOUT_S)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


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


async def added_by_grpc(
    engine: Run, over: Run, prompt: Callable[[], list[int]], new_tokens: int, turns: int
) -> dict[str, Estimate]:
    """What one request alone pays for the cluster, beyond engine and transfer.

    To the first token: the client's time minus prefill's compute, of the same request; the transfer comes after it.
    Per token after the first: TPOT without the request's own transfer, against the bare engine's TPOT before and after.
    """
    bare, grpc_samples = await in_turns(lambda: engine(prompt(), new_tokens), lambda: over(prompt(), new_tokens), turns)
    summaries = [s.summary or GenerationSummary() for s in grpc_samples]
    tpots = [
        s.tpot_ms - summary.transfer_ms / (new_tokens - 1) for s, summary in zip(grpc_samples, summaries, strict=True)
    ]
    return {
        "added_ttft_ms": estimate(
            [s.ttft_ms - x.prefill_compute_ms for s, x in zip(grpc_samples, summaries, strict=True)]
        ),
        "added_ms_per_token": estimate(added([s.tpot_ms for s in bare], tpots)),
    }


def config_of(model: Path) -> Config:
    return Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": "bench"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": 1024, "threads": 1},
            "kv_store": {"enabled": False},
        }
    )


async def measure_tiny(turns: int) -> dict[str, Estimate]:
    """Steps of about a millisecond: what is added shows, and any contention with the engine counts in full."""
    rng = np.random.default_rng(1)
    config = config_of(prepare_tiny("llama", cache_home() / "bench" / "tiny-llama"))
    async with engine_and_cluster(config) as (engine, cluster), AsyncClient(cluster.router_address) as client:

        def prompt() -> list[int]:
            return rng.integers(3, 250, size=64).tolist()  # type: ignore[no-any-return]

        await added_by_grpc(engine, over_grpc(client), prompt, 64, 5)  # warm
        return await added_by_grpc(engine, over_grpc(client), prompt, 64, turns)


def percentile(values: list[float], q: float) -> float:
    return float(np.percentile(values, q))


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def hops(samples: list[Sample]) -> list[list[str]]:
    """Where the time to first token and the handoff went: medians over the requests, from the router's summary."""
    rows = [["hop", "ms", "share of TTFT"]]
    summaries = [s.summary for s in samples if s.summary]
    ttft = statistics.median(s.ttft_ms for s in samples)
    parts = {
        "queue": [s.queue_ms for s in summaries],
        "reserve": [s.reserve_ms for s in summaries],
        "prefill compute": [s.prefill_compute_ms for s in summaries],
        "rpc and rest": [
            x.ttft_ms - x.summary.queue_ms - x.summary.reserve_ms - x.summary.prefill_compute_ms
            for x in samples
            if x.summary
        ],
        "KV transfer (after the first token)": [s.transfer_exposed_ms for s in summaries],
    }
    for name, values in parts.items():
        middle = statistics.median(values)
        rows.append([name, f"{middle:.2f}", f"{100 * middle / ttft:.1f} %"])
    return rows


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = prepare_smollm2()
    rng = np.random.default_rng(0)

    def prompts(count: int, tokens: int) -> list[list[int]]:
        return rng.integers(100, 40_000, size=(count, tokens)).tolist()  # type: ignore[no-any-return]

    samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    async with (
        engine_and_cluster(config_of(model)) as (in_process, cluster),
        AsyncClient(cluster.router_address) as grpc_client,
        httpx.AsyncClient(base_url=cluster.gateway_url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http,
    ):
        runs = dict(zip(PATHS, (in_process, over_grpc(grpc_client), over_http(http, model.name)), strict=True))
        for path in PATHS:  # warm: connections, allocators, first-use imports
            await burst(runs[path], prompts(1, 64), 4, 1)
        for round_index in range(args.rounds):
            for concurrency in (1, 4, 16):
                for path in PATHS:
                    work = prompts(concurrency, args.prompt_tokens)
                    found, rate = await burst(runs[path], work, args.new_tokens, concurrency)
                    samples[path, concurrency] += found
                    rates[path, concurrency].append(rate)
                    print(
                        f"round {round_index + 1}/{args.rounds}  {path:6} c={concurrency:<2} {rate:6.1f} tokens/s",
                        flush=True,
                    )
        estimates = await added_by_grpc(
            in_process, runs["grpc"], lambda: prompts(1, 64)[0], args.new_tokens, args.rounds * 8
        )
        long_prompts, _ = await burst(runs["grpc"], prompts(args.rounds * 2, 1024), 8, 1)
        floor_ms = await idle_round_trip_ms(cluster.router_address)
    tiny = await measure_tiny(args.rounds * 40)

    rows = [["path", "concurrency", "TTFT p50 ms", "p95", "TPOT p50 ms", "p95", "tokens/s"]]
    for concurrency in (1, 4, 16):
        for path in PATHS:
            found = samples[path, concurrency]
            ttft, tpot = [s.ttft_ms for s in found], [s.tpot_ms for s in found]
            rows.append(
                [
                    path,
                    str(concurrency),
                    *(f"{percentile(v, q):.1f}" for v in (ttft, tpot) for q in (50, 95)),
                    f"{statistics.median(rates[path, concurrency]):.1f}",
                ]
            )
    print(f"\n{args.prompt_tokens} prompt tokens, {args.new_tokens} new, SmolLM2-135M fp32, 1 thread per engine\n")
    print(table(rows))
    print("\n1024-token prompts, concurrency 1, through gRPC\n")
    print(table(hops(long_prompts)))
    verdicts = [
        *((f"{name}, SmolLM2", value, TARGETS[name]) for name, value in estimates.items()),
        *((f"{name}, tiny model", value, TARGETS[name]) for name, value in tiny.items()),
        (
            "transfer_share_of_ttft_1k",
            estimate([s.summary.transfer_ms / s.ttft_ms for s in long_prompts if s.summary]),
            0.05,
        ),
    ]
    print("\nmedian [95 % interval] of requests")
    for name, value, target in verdicts:
        print(f"{name:32} {value!s:32} target ≤ {target}  {value.verdict(target)}")
    print(f"one empty unary gRPC call from idle: {floor_ms:.2f} ms")
    return {
        "idle_round_trip_ms": floor_ms,
        "conditions": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **vars(args)},
        "table": rows,
        "hops_1k": hops(long_prompts),
        "targets": {name: {**asdict(value), "target": target} for name, value, target in verdicts},
        "samples": {f"{path} c={c}": [asdict(s) for s in found] for (path, c), found in samples.items()},
    }


def draw(result: Mapping[str, Any], picture: Path) -> None:
    columns = {"TTFT p50 (ms)": 2, "TPOT p50 (ms)": 4, "tokens/s": 6}
    panels = {
        metric: {
            path: {f"c={row[1]}": float(row[column]) for row in result["table"][1:] if row[0] == path} for path in PATHS
        }
        for metric, column in columns.items()
    }
    conditions = result["conditions"]
    title = f"{conditions['prompt_tokens']} prompt tokens, {conditions['new_tokens']} new, SmolLM2-135M fp32"
    grouped_bars(panels, title, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_const", const=1, dest="rounds", help="one round")
    parser.add_argument("--out", default="bench/results/serving.json")
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    result = uvloop.run(measure(args))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, default=str))
    picture = out.with_suffix(".png")
    draw(result, picture)
    print(f"\nwritten to {out} and {picture}")


if __name__ == "__main__":
    main()
