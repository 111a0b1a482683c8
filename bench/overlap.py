"""What pulling KV while it is computed hides of the transfer: the same cluster with and without it, turn by turn.

    python -m bench.overlap [--rounds 3] [--prompt-tokens 256 1024 4096] [--out bench/results/overlap.json]

Two 1P1D clusters on one machine, `transport.overlap` auto and off; only one of them works at a time. Prompts are random
token ids, so no cache helps. Exposed is the time from the Decode call, which follows the first token, until decode has
all of the KV; moving is the time in which bytes moved, whenever that was. Efficiency is the hidden share of moving:
1 − exposed / moving, at least 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.plots import grouped_bars
from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from sagellm_common.core.types import GenerationSummary
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome
from services.cli.models import prepare_smollm2

MODES = ("auto", "off")
NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `gap_ms` is what its client waited from the first token to the second."""

    gap_ms: float
    summary: GenerationSummary

    @property
    def efficiency(self) -> float:
        return max(0.0, 1.0 - self.summary.transfer_exposed_ms / self.summary.transfer_ms)


async def turn(client: AsyncClient, prompt: list[int]) -> Turn:
    arrivals: list[float] = []
    summary = None
    async for output in client.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
        arrivals += [time.perf_counter()] * len(output.token_ids)
        summary = output.summary or summary
    assert summary is not None, "the last output of a generation has its summary"
    return Turn(1e3 * (arrivals[1] - arrivals[0]), summary)


@asynccontextmanager
async def a_cluster(mode: str, model: Path, longest_prompt: int) -> AsyncIterator[AsyncClient]:
    config = Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": f"bench-{mode}"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": longest_prompt // 16 + 64, "threads": 1, "prefix_caching": False},
            "kv_store": {"enabled": False},
            "transport": {"overlap": mode},
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        home = ClusterHome("bench", Path(scratch))
        with home.owned():
            cluster = Cluster(config, home)
            try:
                await cluster.start()
                async with AsyncClient(cluster.router_address) as client:
                    yield client
            finally:
                await cluster.stop()


async def measure(lengths: Sequence[int], rounds: int) -> dict[tuple[int, str], list[Turn]]:
    model, rng = prepare_smollm2(), np.random.default_rng(0)
    turns: dict[tuple[int, str], list[Turn]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        clients = {mode: await stack.enter_async_context(a_cluster(mode, model, max(lengths))) for mode in MODES}

        def prompt(tokens: int) -> list[int]:
            return rng.integers(100, 40_000, size=tokens).tolist()  # type: ignore[no-any-return]

        for client in clients.values():  # warm: connections, allocators, first-use imports
            await turn(client, prompt(128))
        for round_index in range(rounds):
            for tokens in lengths:
                # Who goes first alternates, too.
                for mode in MODES if round_index % 2 == 0 else MODES[::-1]:
                    done = await turn(clients[mode], prompt(tokens))
                    turns[tokens, mode].append(done)
                    print(
                        f"round {round_index + 1}/{rounds}  {tokens:5} tokens  overlap {mode:4}  "
                        f"exposed {done.summary.transfer_exposed_ms:7.1f} ms",
                        flush=True,
                    )
    return turns


def middle(turns: Sequence[Turn], name: str) -> float:
    """Median of a property of the turns or of their summaries."""
    return statistics.median(getattr(t, name) if hasattr(t, name) else getattr(t.summary, name) for t in turns)


def rows(lengths: Sequence[int], turns: Mapping[tuple[int, str], Sequence[Turn]]) -> list[dict[str, float]]:
    found = []
    for tokens in lengths:
        on, off = turns[tokens, "auto"], turns[tokens, "off"]
        compute = [a.summary.prefill_compute_ms / b.summary.prefill_compute_ms for a, b in zip(on, off, strict=True)]
        found.append(
            {
                "prompt_tokens": tokens,
                "kv_mb": middle(on, "kv_bytes_transferred") / 1e6,
                "mb_before_first_token": middle(on, "kv_bytes_ahead") / 1e6,
                "moving_ms": middle(on, "transfer_ms"),
                "moving_off_ms": middle(off, "transfer_ms"),
                "exposed_ms": middle(on, "transfer_exposed_ms"),
                "exposed_off_ms": middle(off, "transfer_exposed_ms"),
                "gap_ms": middle(on, "gap_ms"),
                "gap_off_ms": middle(off, "gap_ms"),
                "efficiency": middle(on, "efficiency"),
                "prefill_compute_ratio": statistics.median(compute),
            }
        )
    return found


def table(found: Sequence[Mapping[str, float]]) -> str:
    head = "prompt    KV MB  before first token   moving ms   exposed ms on/off   1st→2nd token ms on/off   efficiency"
    lines = [head, "-" * len(head)]
    lines += [
        f"{r['prompt_tokens']:6.0f}  {r['kv_mb']:7.1f}  {r['mb_before_first_token']:8.1f} MB {_share(r):6.1%}  "
        f"{r['moving_ms']:10.1f}  {r['exposed_ms']:9.1f} /{r['exposed_off_ms']:7.1f}  "
        f"{r['gap_ms']:15.1f} /{r['gap_off_ms']:7.1f}  {r['efficiency']:11.1%}"
        for r in found
    ]
    return "\n".join(lines)


def _share(row: Mapping[str, float]) -> float:
    return row["mb_before_first_token"] / row["kv_mb"]


def draw(found: Sequence[Mapping[str, float]], picture: Path) -> None:
    def by_length(name: str) -> dict[str, float]:
        return {f"{row['prompt_tokens']:.0f}": row[name] for row in found}

    panels = {
        "exposed transfer (ms)": {"overlap": by_length("exposed_ms"), "pull at the end": by_length("exposed_off_ms")},
        "first to second token (ms)": {"overlap": by_length("gap_ms"), "pull at the end": by_length("gap_off_ms")},
        "MB here with the first token": {
            "overlap": by_length("mb_before_first_token"),
            "pull at the end": {f"{row['prompt_tokens']:.0f}": 0.0 for row in found},
        },
    }
    grouped_bars(panels, "prompt tokens; SmolLM2-135M fp32, 1P1D, tcp, digest on", picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="bench/results/overlap.json")
    args = parser.parse_args()
    turns = asyncio.run(measure(args.prompt_tokens, args.rounds))
    found = rows(args.prompt_tokens, turns)
    print(f"\nSmolLM2-135M fp32, 1P1D over tcp, digest on, medians of {args.rounds} alternating turns\n")
    print(table(found))
    ratios = ", ".join(f"{row['prefill_compute_ratio']:.2f} at {row['prompt_tokens']:.0f}" for row in found)
    print(f"\nprefill compute, overlap / without, same turn: {ratios}")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    conditions = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **vars(args)}
    samples = {f"{tokens} {mode}": [asdict(t) for t in found] for (tokens, mode), found in turns.items()}
    out.write_text(json.dumps({"conditions": conditions, "table": found, "samples": samples}, indent=1))
    draw(found, out.with_suffix(".png"))
    print(f"written to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
