"""Handoffs of random sizes, thousands of them, through a 1P1D cluster: does anything grow?

    python -m bench.soak [--handoffs 10000] [--in-flight 8] [--out bench/results/soak.json]

A tiny random model, so that the handoffs and not the engine are the work. Prompts are random token ids of random
lengths: each one's KV is moved. Memory (RSS) and descriptors of every process are looked at a hundred times. The
first fifth is warm-up: caches fill, allocators find their size. Exit code 1 when something grew after it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from bench.plots import lines
from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome
from services.cli.models import prepare_tiny

SAMPLES = 100
WARM_UP_SHARE = 0.2
LONGEST_PROMPT_TOKENS = 600
NEW_TOKENS = 2
MAX_GROWTH = 1.05
"""Median RSS of the last quarter after warm-up over that of the first: an allocator is never quite still."""
MAX_MORE_FDS = 4
"""A connection more or less is none leaked; one per thousand handoffs would be."""


@dataclass(slots=True)
class Curves:
    """Per process, at the same points: handoffs done, MB of RSS, open descriptors."""

    handoffs: list[int] = field(default_factory=list)
    rss_mb: dict[str, list[float]] = field(default_factory=dict)
    fds: dict[str, list[int]] = field(default_factory=dict)

    def sample(self, handoffs: int, processes: Mapping[str, psutil.Process]) -> None:
        self.handoffs.append(handoffs)
        for name, process in processes.items():
            self.rss_mb.setdefault(name, []).append(process.memory_info().rss / 1e6)
            self.fds.setdefault(name, []).append(process.num_fds())

    def growth(self, name: str) -> tuple[float, int]:
        """(RSS at the end over RSS after warm-up, descriptors more than after warm-up)"""
        rss, fds = (_settled(values[name]) for values in (self.rss_mb, self.fds))
        quarter = max(1, len(rss) // 4)
        first, last = float(np.median(rss[:quarter])), float(np.median(rss[-quarter:]))
        return last / first, round(float(np.median(fds[-quarter:]) - np.median(fds[:quarter])))

    def complaints(self) -> list[str]:
        found = []
        for name in self.rss_mb:
            memory, descriptors = self.growth(name)
            if memory > MAX_GROWTH:
                found.append(f"{name}: memory grew to {memory:.3f} of what it was after warm-up")
            if descriptors > MAX_MORE_FDS:
                found.append(f"{name}: {descriptors} more descriptors than after warm-up")
        return found


def _settled(values: Sequence[float]) -> Sequence[float]:
    return values[int(WARM_UP_SHARE * len(values)) :]


async def soak(
    router_address: str,
    processes: Mapping[str, psutil.Process],
    handoffs: int,
    *,
    in_flight: int = 8,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[int, Curves], None] = lambda done, curves: None,
) -> Curves:
    """Raises AssertionError for a request that was answered without a handoff, and what a request failed with."""
    rng, curves = np.random.default_rng(seed), Curves()
    async with AsyncClient(router_address) as client:

        async def one() -> None:
            prompt = rng.integers(3, 259, size=rng.integers(1, LONGEST_PROMPT_TOKENS + 1)).tolist()
            done = await client.complete(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
            assert done.summary.kv_bytes_transferred > 0, f"{done.request_id} moved no KV"

        for turn in range(samples):
            left = handoffs * (turn + 1) // samples - handoffs * turn // samples
            while left > 0:
                count = min(in_flight, left)
                await asyncio.gather(*(one() for _ in range(count)))
                left -= count
            done = handoffs * (turn + 1) // samples
            curves.sample(done, processes)
            progress(done, curves)
    return curves


@asynccontextmanager
async def a_cluster() -> AsyncIterator[Cluster]:
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare_tiny("llama", Path(scratch) / "tiny-llama")
        config = Config.model_validate(
            {
                "cluster": {"port_base": 0, "name": "soak"},
                "model": {"path": str(model)},
                "engine": {"num_blocks": 512, "max_prefill_tokens": 256},
                "transport": {"overlap_min_bytes": 80_000},
                "kv_store": {"budget_bytes": 32 << 20},
            }
        )
        home = ClusterHome("soak", Path(scratch))
        with home.owned():
            cluster = Cluster(config, home, restart=False)
            try:
                await cluster.start()
                yield cluster
            finally:
                await cluster.stop()


async def measure(handoffs: int, in_flight: int) -> Curves:
    began_s = time.monotonic()

    def progress(done: int, curves: Curves) -> None:
        if len(curves.handoffs) % 10 == 0:
            mb = "  ".join(f"{name} {values[-1]:.0f} MB" for name, values in curves.rss_mb.items())
            print(f"{done:6} of {handoffs}  {done / (time.monotonic() - began_s):5.0f}/s  {mb}", flush=True)

    async with a_cluster() as cluster:
        processes = {m.id: psutil.Process(m.ready.pid) for m in cluster.members.values() if m.ready}
        return await soak(cluster.router_address, processes, handoffs, in_flight=in_flight, progress=progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handoffs", type=int, default=10_000)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak.json"))
    args = parser.parse_args()
    began_s = time.monotonic()
    curves = asyncio.run(measure(args.handoffs, args.in_flight))
    for name in curves.rss_mb:
        memory, descriptors = curves.growth(name)
        print(
            f"{name:12} memory ×{memory:.3f}  descriptors {descriptors:+d}  (last quarter over the first after warm-up)"
        )
    complaints = curves.complaints()
    conditions = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "handoffs": args.handoffs,
        "in_flight": args.in_flight,
        "prompt_tokens": f"1..{LONGEST_PROMPT_TOKENS}",
        "seconds": round(time.monotonic() - began_s, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"conditions": conditions, "complaints": complaints, "handoffs": curves.handoffs}
    args.out.write_text(json.dumps({**result, "rss_mb": curves.rss_mb, "fds": curves.fds}))
    panels = {
        "RSS (MB)": {n: dict(zip(curves.handoffs, v, strict=True)) for n, v in curves.rss_mb.items()},
        "open descriptors": {n: dict(zip(curves.handoffs, v, strict=True)) for n, v in curves.fds.items()},
    }
    lines(
        panels,
        f"{args.handoffs} handoffs of 1..{LONGEST_PROMPT_TOKENS} tokens, tiny Llama, 1P1D, tcp",
        args.out.with_suffix(".png"),
    )
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")
    print("\n".join(complaints) or "nothing grew")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
