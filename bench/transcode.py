"""What transcoding adds to a pull over TCP, and how fast dtypes are converted: `python -m bench.transcode`.

Pulls between two processes, blocks permuted, digests on; those into blocks of each layout take turns in random order.

    added    time of a pull into blocks of another layout over that into blocks of the same, minus one: of the best of
             all rounds, and of the medians; CPU: the same of the receiver's CPU seconds (the best)
    moving   time spent on moving bytes to their places, over that of the pull. Not all of it is added: what was
             received is in the core's cache then, and the memory is written but once
    rate     GB/s of the source's bytes that one core converts, the deviation included
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving import table
from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.comm_backend.token_pull import TokenPuller
from sagellm_common.comm_backend.transcode import row_bytes
from sagellm_common.comm_backend.wire_dtype import seconds_per_head
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.types import KvLayout, KvSource

MODELS = {"SmolLM2-135M, float32": (30, 3, 64, "float32"), "Qwen2-7B, bfloat16": (28, 4, 128, "bfloat16")}
"""layers, KV heads, head size, dtype"""
BLOCK_SIZE_TOKENS = 16
RESHAPES = {"blocks of 32": (32, 1), "blocks of 8": (8, 1), "blocks of 24": (24, 1), "2 ranks": (16, 2)}
"""block size and ranks of the receiver"""
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8/float32", "int4/float32")
TARGET_ADDED = 0.05
HOST = "127.0.0.1"
LEASE_TTL_S = 3600.0
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Added:
    best: float
    median: float
    cpu: float
    moving: float
    gb_per_s: float


def a_region(num_blocks: int, block_bytes: int) -> KvRegion:
    data = np.random.default_rng(0).integers(0, 256, num_blocks * block_bytes, dtype=np.uint8)
    return KvRegion(data.data, block_bytes, num_blocks)


def an_end(region: KvRegion) -> PullQueue:
    leases = HandoffSource(LEASE_TTL_S, SystemClock(), lambda _: None)
    leases.pin("bench", 1, Allocation(np.arange(region.num_blocks, dtype=np.int32)), 0)
    return make_channel(TransportConfig(backend="tcp"), region, leases, HOST, 0)


def run_source(pipe: Connection, num_blocks: int, block_bytes: int) -> None:
    async def serve() -> None:
        channel = an_end(a_region(num_blocks, block_bytes))
        pipe.send(await channel.start())
        with contextlib.suppress(EOFError):  # until the parent closes its end
            await asyncio.to_thread(pipe.recv)
        await channel.close()

    asyncio.run(serve())


@contextlib.asynccontextmanager
async def a_pair(region: KvRegion) -> AsyncIterator[tuple[PullQueue, KvSource]]:
    """A receiver, and another process with as many blocks to pull from."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_source, args=(theirs, region.num_blocks, region.block_bytes), daemon=True)
    process.start()
    theirs.close()
    channel = an_end(region)
    try:
        address = await asyncio.to_thread(ours.recv)
        table = np.arange(region.num_blocks, dtype=np.int32)
        yield channel, KvSource("bench", 1, "source", "1", "", address, channel.name, table, 0, 0)
    finally:
        await channel.close()
        ours.close()
        await asyncio.to_thread(process.join)


def a_layout(model: str, block_size_tokens: int, tp: int = 1) -> KvLayout:
    layers, heads, head_dim, dtype = MODELS[model]
    layout = KvLayout(model, dtype, block_size_tokens, layers, heads, head_dim, 0, tp)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * layers * block_size_tokens)


async def reshapes(model: str, total_bytes: int, rounds: int) -> dict[str, Added]:
    same = a_layout(model, BLOCK_SIZE_TOKENS)
    layouts = {"same": same} | {
        name: a_layout(model, size, tp) for name, (size, tp) in RESHAPES.items() if same.num_kv_heads % tp == 0
    }
    num_blocks = total_bytes // same.block_bytes // 6 * 6  # whole blocks of all sizes
    num_tokens = num_blocks * BLOCK_SIZE_TOKENS
    region = a_region(2 * num_blocks, same.block_bytes)
    wall: dict[str, list[float]] = {name: [] for name in layouts}
    cpu: dict[str, list[float]] = {name: [] for name in layouts}
    moving: dict[str, list[float]] = {name: [] for name in layouts}
    async with a_pair(region) as (channel, source):
        rng = np.random.default_rng(0)
        source = replace(source, block_table=rng.permutation(2 * num_blocks)[:num_blocks].astype(np.int32))
        # The same memory for all, in blocks of each layout.
        pools = {
            name: KvRegion(region.view, layout.block_bytes, len(region.view) // layout.block_bytes)
            for name, layout in layouts.items()
        }
        pullers = {name: TokenPuller(channel, pools[name], layout) for name, layout in layouts.items()}
        for turn in range(rounds + 1):
            for name in random.Random(turn).sample(sorted(layouts), len(layouts)):
                count = num_tokens // layouts[name].block_size_tokens
                blocks = rng.permutation(pools[name].num_blocks)[:count].astype(np.int32)
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                found = await pullers[name].pull(source, same, blocks, 0, num_tokens, timeout_s=TIMEOUT_S)
                if turn:  # the first connects and touches memory
                    wall[name].append(time.perf_counter() - began_s)
                    cpu[name].append(time.process_time() - began_cpu_s)
                    moving[name].append(found.transcode_s)
    return {
        name: Added(
            best=min(wall[name]) / min(wall["same"]) - 1,
            median=statistics.median(wall[name]) / statistics.median(wall["same"]) - 1,
            cpu=min(cpu[name]) / min(cpu["same"]) - 1,
            moving=min(moving[name]) / min(wall[name]),
            gb_per_s=num_blocks * same.block_bytes / min(wall[name]) / 1e9,
        )
        for name in layouts
    }


def rates(head_dim: int = 64) -> dict[str, dict[str, float]]:
    """GB/s by source and target dtype."""
    found: dict[str, dict[str, float]] = {}
    for source in DTYPES:
        layout = KvLayout("", source, 1, 1, 1, head_dim, 0)
        head_bytes = sum(row_bytes(layout)) / 2
        found[source] = {
            target: head_bytes / seconds_per_head(source, target, head_dim) / 1e9
            for target in DTYPES
            if target != source
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="bench/results/transcode.json")
    args = parser.parse_args()
    added = {model: asyncio.run(reshapes(model, args.total_mib << 20, args.rounds)) for model in MODELS}
    rows = [["pulled", "into", "added: best", "median", "CPU", "moving", "GB/s (best)"]]
    rows += [
        [
            model,
            name,
            *(f"{share:+.1%}" for share in (one.best, one.median, one.cpu, one.moving)),
            f"{one.gb_per_s:.2f}",
        ]
        for model, all_of in added.items()
        for name, one in all_of.items()
    ]
    print(f"{args.total_mib} MiB, {args.rounds} rounds; target: {TARGET_ADDED:.0%} added\n{table(rows)}\n")
    converted = rates()
    print("conversion, GB/s of the source's bytes, one core")
    rows = [["from \\ to", *DTYPES]]
    rows += [[source, *(f"{to[t]:.2f}" if t in to else "–" for t in DTYPES)] for source, to in converted.items()]
    print(table(rows))
    result: dict[str, Any] = {
        "conditions": {
            "total_mib": args.total_mib,
            "rounds": args.rounds,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "added": {model: {name: asdict(one) for name, one in all_of.items()} for model, all_of in added.items()},
        "conversion_gb_per_s": converted,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
