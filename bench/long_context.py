"""Prompts of 32K, 64K and 128K tokens through one prefill and one decode worker, on a tiny RoPE model.

Asked of each length: are the tokens those of a plain, unpaged forward pass of Hugging Face transformers; how long is
TTFT; does any process grow when the request is repeated. And of the longest prompt, sent in steps that each add one
window to what the prefix cache has: how does prefill speed fall with the context.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.plots import lines
from bench.serving import table
from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome
from services.cli.models import cache_home, prepare_tiny_long_context

NEW_TOKENS = 16
BLOCK_TOKENS = 16
REQUEST_TIMEOUT_S = 1800.0
STORE_BYTES = 32 << 20
"""A little less than the longest prompt's KV: the store is full, and evicts, from the second request on."""
GROWTH_LIMIT_MIB = 8.0
"""Of any process, once pools and stores are full: allocators keep a little."""


@dataclass(frozen=True, slots=True)
class Sample:
    tokens: tuple[int, ...]
    ttft_ms: float
    compute_ms: float
    transfer_ms: float
    kv_bytes: int
    cached_tokens: int


async def ask(client: AsyncClient, prompt: list[int], salt: str) -> Sample:
    """A salt of its own keeps a request from what the prefix caches hold of others."""
    start, first, tokens, summary = time.perf_counter(), 0.0, list[int](), None
    outputs = client.generate(
        prompt, max_tokens=NEW_TOKENS, ignore_eos=True, cache_salt=salt, timeout_s=REQUEST_TIMEOUT_S
    )
    async for output in outputs:
        if output.token_ids and not tokens:
            first = time.perf_counter()
        tokens += output.token_ids
        summary = output.summary or summary
    assert summary is not None
    return Sample(
        tuple(tokens),
        1e3 * (first - start),
        summary.prefill_compute_ms,
        summary.transfer_ms,
        summary.kv_bytes_transferred,
        summary.cached_tokens,
    )


def reference(model_path: Path, prompt: list[int]) -> tuple[int, ...]:
    """Greedy tokens of transformers: keys and values in one tensor, no blocks, no chunks."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tuple(found[0, len(prompt) :].tolist())


def memory_mib(cluster: Cluster) -> dict[str, float]:
    """Peak resident memory of each process since the last call."""
    peaks = {}
    for name, member in cluster.members.items():
        assert member.process is not None
        status = Path(f"/proc/{member.process.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        peaks[name] = round(int(peak.split()[1]) / 1024, 1)
        Path(f"/proc/{member.process.pid}/clear_refs").write_text("5")  # starts the peak anew
    return peaks


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = prepare_tiny_long_context(cache_home() / "bench" / "tiny-long-context")
    longest = max(args.lengths)
    config = Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": "bench"},
            "model": {"path": str(model)},
            "engine": {
                "num_blocks": (longest + 2 * NEW_TOKENS) // BLOCK_TOKENS + 64,
                "max_prefill_tokens": args.chunk,
                "threads": 1,
            },
            "kv_store": {"budget_bytes": STORE_BYTES},
            "router": {"request_timeout_s": REQUEST_TIMEOUT_S},
        }
    )
    rng = np.random.default_rng(0)
    prompt: list[int] = rng.integers(3, 259, size=longest).tolist()
    lengths: dict[int, list[Sample]] = {}
    memory: dict[int, list[dict[str, float]]] = {}
    windows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch, ClusterHome("bench", Path(scratch)).owned():
        cluster = Cluster(config, ClusterHome("bench", Path(scratch)))
        try:
            await cluster.start()
            async with AsyncClient(cluster.router_address) as client:
                for length in sorted(args.lengths, reverse=True):  # the longest first: it touches the whole pool
                    lengths[length], memory[length] = [], []
                    for turn in range(args.repeats):
                        lengths[length].append(await ask(client, prompt[:length], f"{length}/{turn}"))
                        memory[length].append(memory_mib(cluster))
                        print(
                            f"{length:6} tokens, turn {turn + 1}: TTFT {lengths[length][-1].ttft_ms:8.0f} ms",
                            flush=True,
                        )
                for end in range(args.window, longest + 1, args.window):
                    found = await ask(client, prompt[:end], "windows")
                    computed = end - found.cached_tokens
                    windows.append(
                        {"end": end, "computed": computed, "tokens_per_s": 1e3 * computed / found.compute_ms}
                    )
                    print(f"window up to {end:6}: {windows[-1]['tokens_per_s']:7.0f} tokens/s", flush=True)
        finally:
            await cluster.stop()

    full = memory[longest][1]
    wanted = {}
    for length in args.lengths:
        print(f"reference of {length} tokens…", flush=True)
        wanted[length] = await asyncio.to_thread(reference, model, prompt[:length])
    rows = [
        [
            "prompt tokens",
            "tokens right",
            "TTFT s",
            "prefill tokens/s",
            "KV MB",
            "transfer ms",
            "peak MiB prefill",
            "decode",
        ]
    ]
    verdict = {}
    for length in args.lengths:
        found = lengths[length]
        right = sum(sample.tokens == wanted[length] for sample in found)
        growth = max(memory[length][-1][name] - full[name] for name in full)
        verdict[length] = {"right": right == len(found), "growth_mib": growth, "stable": growth <= GROWTH_LIMIT_MIB}
        middle = sorted(found, key=lambda sample: sample.ttft_ms)[len(found) // 2]
        rows.append(
            [
                str(length),
                f"{right}/{len(found)}",
                f"{middle.ttft_ms / 1e3:.2f}",
                f"{1e3 * length / middle.compute_ms:.0f}",
                f"{middle.kv_bytes / 1e6:.1f}",
                f"{middle.transfer_ms:.1f}",
                *(
                    f"{memory[length][0][name]:.0f} → {memory[length][-1][name]:.0f}"
                    for name in ("prefill-0", "decode-0")
                ),
            ]
        )
    speeds = [window["tokens_per_s"] for window in windows]
    print(f"\n2-layer Llama, 2 heads of 16, chunks of {args.chunk} tokens, 1 thread per engine\n")
    print(table(rows))
    print(
        f"\nprefill of one window of {args.window} tokens: {speeds[0]:.0f} tokens/s at the start, "
        f"{speeds[-1]:.0f} at the end"
    )
    for length, found_out in verdict.items():
        print(
            f"{length:6} tokens: {'right' if found_out['right'] else 'WRONG'}, memory "
            f"{'stable' if found_out['stable'] else 'GROWS'} ({found_out['growth_mib']:+.1f} MiB)"
        )
    return {
        "conditions": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            **vars(args),
        },
        "table": rows,
        "windows": windows,
        "memory_mib": memory,
        "verdict": verdict,
    }


def draw(result: Mapping[str, Any], picture: Path) -> None:
    windows = {"prefill": {w["end"] / 1024: w["tokens_per_s"] for w in result["windows"]}}
    ttft = {"1P1D": {int(row[0]) / 1024: float(row[2]) for row in result["table"][1:]}}
    memory = {
        name: {
            f"{int(length) // 1024}K #{turn + 1}": peaks[name]
            for length, turns in result["memory_mib"].items()
            for turn, peaks in enumerate(turns)
        }
        for name in result["memory_mib"][max(result["memory_mib"])][0]
    }
    panels = {
        f"tokens/s of each {result['conditions']['window'] // 1024}K window, by its end (K tokens)": windows,
        "TTFT (s) by prompt (K tokens)": ttft,
        "peak memory (MiB) of each request": memory,
    }
    lines(panels, "128K tokens through 1P1D, tiny Llama fp32, 1 thread per engine", picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32 << 10, 64 << 10, 128 << 10])
    parser.add_argument("--repeats", type=int, default=3, help="of each length, at least two")
    parser.add_argument("--window", type=int, default=8 << 10)
    parser.add_argument("--chunk", type=int, default=2048, help="engine.max_prefill_tokens")
    parser.add_argument("--out", default="bench/results/long_context.json")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: one request alone does not show whether memory grows")
    result = asyncio.run(measure(args))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    draw(result, out.with_suffix(".png"))
    print(f"\nwritten to {out} and {out.with_suffix('.png')}")
    if not all(found["right"] and found["stable"] for found in result["verdict"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
