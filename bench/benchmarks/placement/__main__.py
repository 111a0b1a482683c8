"""`sagellm bench placement`: strategies on a real 2P2D cluster, in turns under a mixed workload: p95 TTFT and TPOT.

    sagellm bench placement [--strategies fifo,hybrid] [--turns 3] [--rate 3] [--quick] [--json OUT]

One cluster serves all of them: `SetStrategy` changes the router between turns, the engines' order is on_time, which is
first come, first served for strategies that know no targets. Each turn has the same lengths and arrivals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench.benchmarks.placement.measure import Turn, Workload, measure
from bench.paired import estimate
from sagellm_common.core.errors import ConfigError
from sagellm_common.scheduler_ir.strategies import STRATEGIES
from services.cli.models import prepare_smollm2, prepare_tiny

QUICK = Workload(requests=16, rate_rps=8.0, turns=1, document_tokens=128, long_tokens=256)


def rows(turns: Sequence[Turn], strategies: Sequence[str], load: Workload) -> list[dict[str, object]]:
    """A strategy's medians over its turns, and how it compares with the first one's turn beside each of its own."""
    found: list[dict[str, object]] = []
    of = {name: [turn for turn in turns if turn.strategy == name] for name in strategies}
    for name in strategies:
        row: dict[str, object] = {"strategy": name}
        for what in ("ttft_ms", "tpot_ms"):
            mine, base = ([turn.p95(what) for turn in of[one]] for one in (name, strategies[0]))
            ratio = estimate([a / b for a, b in zip(mine, base, strict=True)])
            row[f"p95_{what}"] = estimate(mine).value
            row[f"p95_{what}_ratio"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
        row["in_time"] = estimate([turn.in_time(load) for turn in of[name]]).value
        answers = [answer for turn in of[name] for answer in turn.answers]
        row["cached_tokens"] = sum(answer.cached_tokens for answer in answers) / len(answers)
        found.append(row)
    return found


def markdown(found: Sequence[dict[str, object]], title: str) -> str:
    head = ["strategy", "p95 TTFT ms", "of the first's", "p95 TPOT ms", "of the first's", "in time", "cached tokens"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        ratios = [row[f"p95_{what}_ratio"] for what in ("ttft_ms", "tpot_ms")]
        told = [f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in ratios if isinstance(r, dict)]
        cells = [
            *(str(row["strategy"]), f"{row['p95_ttft_ms']:,.0f}", told[0], f"{row['p95_tpot_ms']:.1f}", told[1]),
            *(f"{row['in_time']:.1%}", f"{row['cached_tokens']:.0f}"),
        ]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([title, "", *table])


def main() -> int:
    parser = argparse.ArgumentParser("sagellm bench placement", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--strategies", default="fifo,hybrid", help="the first is what the others are compared with")
    parser.add_argument("--turns", type=int, help="of each strategy")
    parser.add_argument("--rate", type=float, help="requests per second")
    parser.add_argument("--requests", type=int, help="per turn")
    parser.add_argument("--ttft-target-ms", type=float)
    parser.add_argument("--tpot-target-ms", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--quick", action="store_true", help="a tiny random model, one short turn: does it work?")
    parser.add_argument("--json", type=Path, help="results go here; the table (.md) beside it")
    args = parser.parse_args()
    given = {
        "turns": args.turns,
        "rate_rps": args.rate,
        "requests": args.requests,
        "ttft_target_ms": args.ttft_target_ms,
        "tpot_target_ms": args.tpot_target_ms,
        "seed": args.seed,
    }
    load = replace(QUICK if args.quick else Workload(), **{k: v for k, v in given.items() if v is not None})
    strategies = args.strategies.split(",")
    try:
        for name in strategies:
            STRATEGIES.get(name)
        if min(load.turns, load.requests, load.rate_rps) <= 0:
            raise ConfigError("--turns, --requests and --rate: each must be greater than 0")
    except ConfigError as err:
        print(f"sagellm bench placement: {err.message}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch, Progress(transient=True) as shown:
        model = prepare_tiny("llama", Path(scratch) / "tiny-llama") if args.quick else prepare_smollm2()
        task = shown.add_task("", total=None)
        turns = asyncio.run(
            measure(model, strategies, load, Path(scratch), lambda text: shown.update(task, description=text))
        )
    found = rows(turns, strategies, load)
    title = (
        f"2P2D on one machine with {os.cpu_count()} CPUs ({platform.machine()}), {model.name}; {load.turns} turns of "
        f"{load.requests} requests at {load.rate_rps:g}/s; targets: TTFT {load.ttft_target_ms:g} ms, TPOT "
        f"{load.tpot_target_ms:g} ms"
    )
    text = markdown(found, title)
    Console(soft_wrap=True).print(text, markup=False)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"workload": asdict(load), "rows": found}, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
