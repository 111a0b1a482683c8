"""One LMDeploy engine in process, the 1P1D cluster through gRPC, and through HTTP, interleaved in one run.

    python -m bench.serving [--quick] [--prompt-tokens 256] [--new-tokens 32] [--out bench/results/serving.json]

All three use the same model, the same prompts' lengths and one torch thread per engine. The cluster has two engines on
the machine's cores, the single engine one; read the columns as what a user sees, not as equal hardware. Prompts are
random token ids, so no cache helps anybody. The single engine and the clients run on uvloop, as the cluster's processes
and the synchronous SDK do.

What the gRPC path adds to one request is measured apart (`serving_added`), with SmolLM2 and with a tiny model whose
steps are too short to hide it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench import serving_added
from bench.paired import estimate
from bench.plots import grouped_bars
from bench.serving_added import Added, added_by_grpc
from bench.serving_runs import (
    REQUEST_TIMEOUT_S,
    Sample,
    burst,
    config_of,
    engine_and_cluster,
    over_grpc,
    over_http,
)
from sagellm_common.client.aio import AsyncClient
from services.cli.models import cache_home, prepare_smollm2, prepare_tiny

PATHS = ("engine", "grpc", "http")
TRANSFER_SHARE_TARGET = 0.05
"""Of the TTFT of a prompt of 1024 tokens."""


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


async def measure_tiny(turns: int) -> dict[str, Added]:
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
    told = [(s, s.summary) for s in samples if s.summary]
    ttft = statistics.median(s.ttft_ms for s in samples)
    parts = {
        "client and its session": [s.ttft_ms - x.ttft_ms for s, x in told],
        "router, prefill worker and their session": [x.ttft_ms - x.prefill_engine_ms for _, x in told],
        "prefill engine": [x.prefill_engine_ms for _, x in told],
        "reserve on decode (meanwhile)": [x.reserve_ms for _, x in told],
        "KV transfer (after the first token)": [x.transfer_exposed_ms for _, x in told],
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
        smollm2 = await added_by_grpc(
            in_process, runs["grpc"], lambda: prompts(1, 64)[0], args.new_tokens, args.rounds * 8
        )
        long_prompts, _ = await burst(runs["grpc"], prompts(args.rounds * 2, 1024), 8, 1)
        floor_ms = await idle_round_trip_ms(cluster.router_address)
    alone = {"SmolLM2": smollm2, "tiny": await measure_tiny(args.rounds * 40)}

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
    print(f"\nWhat the gRPC path adds to one request alone: 64 prompt tokens, {args.new_tokens} new (tiny: 64)\n")
    print(table(serving_added.rows(alone)))
    share = estimate([s.summary.transfer_ms / s.ttft_ms for s in long_prompts if s.summary])
    print(
        f"\nKV of 1024 tokens on its way, as a share of TTFT: {share}, target ≤ {TRANSFER_SHARE_TARGET}: "
        f"{share.verdict(TRANSFER_SHARE_TARGET)}"
    )
    print(f"one empty unary gRPC call from idle: {floor_ms:.2f} ms")
    return {
        "idle_round_trip_ms": floor_ms,
        "conditions": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **vars(args)},
        "table": rows,
        "hops_1k": hops(long_prompts),
        "added": serving_added.as_json(alone),
        "transfer_share_of_ttft_1k": {**asdict(share), "target": TRANSFER_SHARE_TARGET},
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
    serving_added.draw(result["added"], picture.with_name(f"{picture.stem}_added.png"))


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
