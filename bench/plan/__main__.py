"""`sagellm plan`: how many prefill and decode workers this trace needs to meet its targets, and at what cost.

Simulates shapes of a cluster, as `sagellm simulate` does, until the cheapest is found that serves nine of ten of all
offered requests within both targets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.plan.search import Shape, cheapest
from bench.plots import grid
from bench.sim.__main__ import SHOWN_REQUESTS, add_workload, check_targets, every, slo_of, strategy_maker, workload
from bench.sim.cluster import SimCluster
from bench.sim.profile import load_profile
from bench.sim.report import ATTAINMENT, attainment, summary
from sagellm_common.core.errors import ConfigError

EXIT_NOT_ENOUGH = 1


@dataclass(frozen=True, slots=True)
class Tried:
    """One shape: `result` is `sagellm simulate`'s, as far as the run went (`complete`: to its end)."""

    shape: Shape
    attainment: float
    complete: bool
    usd_per_hour: float
    result: Mapping[str, Any]


def plan(args: argparse.Namespace) -> tuple[Tried | None, list[Tried]]:
    """(the cheapest that is enough, all that were simulated). Raises ConfigError."""
    check_targets(args)
    for name in ("usd_per_gpu_hour", "gpus_per_prefill", "gpus_per_decode"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    if args.max_workers < 1:
        raise ConfigError(f"--max-workers {args.max_workers}: must be at least 1")
    profile, make, slo = load_profile(args.profile), strategy_maker(args.strategy), slo_of(args)
    requests = workload(args)
    tried: dict[Shape, Tried] = {}

    def cost(shape: Shape) -> float:
        gpus = args.gpus_per_prefill * shape.prefill + args.gpus_per_decode * shape.decode
        return float(gpus * args.usd_per_gpu_hour)

    with Progress(transient=True) as progress:
        task = progress.add_task("simulating", total=len(requests))

        def enough(shape: Shape) -> bool:
            if shape not in tried:
                progress.reset(task, description=f"{shape}, {len(tried)} shapes before")
                outcome = SimCluster(
                    *(profile, shape.prefill, shape.decode, make, slo),
                    eviction=args.eviction,
                    max_misses=(1 - ATTAINMENT) * len(requests),
                    seed=args.seed,
                ).run(requests, every(SHOWN_REQUESTS, lambda: progress.advance(task, SHOWN_REQUESTS)))
                result = summary(outcome, slo, shape.workers)
                complete = not outcome.gave_up
                tried[shape] = Tried(shape, attainment(outcome, slo), complete, cost(shape), result)
            return tried[shape].complete and tried[shape].attainment >= ATTAINMENT

        found = cheapest(enough, cost, args.max_workers)
    return tried[found] if found else None, sorted(tried.values(), key=lambda t: (t.usd_per_hour, t.shape))


def too_long(args: argparse.Namespace) -> float:
    """Share of prompts that are late on an idle worker without a cache."""
    profile, requests = load_profile(args.profile), workload(args)
    a, b, c = profile.prefill

    def alone_s(tokens: int) -> float:
        return a * -(-tokens // profile.prefill_chunk_tokens) + b * tokens + c * tokens * tokens

    return sum(alone_s(request.prompt_tokens) > slo_of(args).ttft_s for request in requests) / len(requests)


def document(found: Tried | None, tried: list[Tried]) -> dict[str, Any]:
    return {"chosen": _row(found) if found else None, "tried": [_row(one) for one in tried]}


def _row(one: Tried) -> dict[str, Any]:
    tokens = one.result["output_tokens"]
    hours = one.result["duration_s"] / 3600
    per_million = 1e6 * one.usd_per_hour * hours / tokens if tokens and one.complete else None
    return {
        "prefill": one.shape.prefill,
        "decode": one.shape.decode,
        "usd_per_hour": one.usd_per_hour,
        "usd_per_million_output_tokens": per_million,
        "slo_attainment": one.attainment if one.complete else None,
        "given_up": not one.complete,
        **{name: one.result[name] for name in ("ttft_ms", "tpot_ms", "kv_hit_rate", "gpu_busy_share", "duration_s")},
    }


def print_table(found: Tried | None, tried: list[Tried], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("shape", "$/h", "in time", "TTFT p50/p95 ms", "TPOT p50/p95 ms", "KV hit", "busy", "$/M tokens"):
        table.add_column(name, justify="right")
    for one in tried:
        row = _row(one)
        ttft, tpot = row["ttft_ms"], row["tpot_ms"]
        if one.complete:
            times = f"{ttft['p50']:,.0f} / {ttft['p95']:,.0f}", f"{tpot['p50']:.1f} / {tpot['p95']:.1f}"
            dear = row["usd_per_million_output_tokens"]
            cells = (
                *(f"{one.attainment:.1%}", *times, f"{row['kv_hit_rate']:.1%}", f"{row['gpu_busy_share']:.0%}"),
                f"{dear:.2f}" if dear is not None else "–",
            )
        else:
            cells = (f"< {ATTAINMENT:.0%}", *(5 * ("–",)))
        style = "bold" if one is found else None
        table.add_row(f"{one.shape}{' ◄' * (one is found)}", f"{one.usd_per_hour:,.2f}", *cells, style=style)
    Console().print(table)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("sagellm plan", description=(__doc__ or "").partition(": ")[2])
    add_workload(made)
    made.add_argument("--max-workers", type=int, default=64, help="of both kinds together")
    made.add_argument("--usd-per-gpu-hour", type=float, default=3.0)
    made.add_argument("--gpus-per-prefill", type=float, default=1.0, help="of one prefill worker of the profile")
    made.add_argument("--gpus-per-decode", type=float, default=1.0)
    made.add_argument("--json", type=Path, help="all shapes that were simulated; a picture (.png) beside it")
    return made


def main() -> int:
    args = parser().parse_args()
    try:
        found, tried = plan(args)
    except ConfigError as err:
        print(f"sagellm plan: {err.message}", file=sys.stderr)
        return 2
    title = (
        f"{args.trace.name if args.trace else args.format} ×{args.rate_scale:g} on {args.profile}, {args.strategy}; "
        f"targets: TTFT {args.slo_ttft_ms:g} ms, TPOT {args.slo_tpot_ms:g} ms for {ATTAINMENT:.0%} of all offered"
    )
    print_table(found, tried, title)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document(found, tried), indent=1) + "\n")
        values = {(one.shape.prefill, one.shape.decode): one.attainment if one.complete else None for one in tried}
        chosen = (found.shape.prefill, found.shape.decode) if found else None
        grid(values, ("prefill workers", "decode workers", "in time"), title, args.json.with_suffix(".png"), chosen)
    if found is None:
        why = f"no shape of {args.max_workers} workers is enough; raise --max-workers"
        if (share := too_long(args)) > 1 - ATTAINMENT:
            limit = f"{args.slo_ttft_ms:g} ms"
            why += f", or --slo-ttft-ms: {share:.0%} of the prompts take longer than {limit} on an idle worker"
        print(f"sagellm plan: {why}", file=sys.stderr)
        return EXIT_NOT_ENOUGH
    shape = found.shape
    print(f"{shape.prefill} prefill and {shape.decode} decode workers: {found.usd_per_hour:,.2f} $ an hour")
    return 0


if __name__ == "__main__":
    sys.exit(main())
