"""`sagellm bench disaggregation`: where prompts on workers of their own pay, and what it costs where not."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.benchmarks.disaggregation import real, simulated
from sagellm_common.core.errors import SageError
from services.cli.models import prepare_smollm2


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def simulated_table(rows: Sequence[Mapping[str, Any]]) -> str:
    base = {row["load"]: row["latency_s"] for row in rows if row["shape"] == simulated.AGGREGATED}
    head = ("load", "workers", "mean s", "to aggregated", "TTFT p50 / p95 ms", "TPOT p50 / p95 ms", "in time", "split")
    cells = [
        (
            *(row["load"], row["shape"], f"{row['latency_s']:.3f}"),
            f"{100 * (row['latency_s'] / base[row['load']] - 1):+.1f} %",
            *(f"{row[name]['p50']:.1f} / {row[name]['p95']:.1f}" for name in ("ttft_ms", "tpot_ms")),
            f"{row['slo_attainment']:.3f}",
            f"{row['disaggregated']:.2f}, regret {row['regret_ms']:.1f} ms",
        )
        for row in rows
    ]
    return table((*head[:-1], "disaggregated"), cells)


def real_table(found: Mapping[str, Any]) -> str:
    rows = []
    for load, taken in found["seconds"].items():
        for mode in real.MODES:
            ratio = real.ratios(taken, mode)
            counters = found["counters"][mode]
            decided = {
                way: sum(value for name, value in counters.items() if name.startswith(f"separations {way}"))
                for way in ("disaggregated", "aggregated")
            }
            regret = 1e3 * sum(value for name, value in counters.items() if name.startswith("separation_regret"))
            compared = sum(value for name, value in counters.items() if name.startswith("separation_compared"))
            rows.append(
                (
                    *(load, mode, f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"),
                    f"{decided['disaggregated']:.0f} / {decided['aggregated']:.0f}",
                    f"{regret / compared:.1f}" if compared else "–",
                )
            )
    head = ("load", "disaggregate", "time to never's", "all loads: split / not", "regret ms per request")
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("sagellm bench disaggregation", description=__doc__.partition(": ")[2])
    parser.add_argument("--real", action="store_true", help="three 1P1D clusters that take turns, not the simulator")
    parser.add_argument("--turns", type=int, default=12, help="of the real clusters")
    parser.add_argument("--model", type=Path, help="of the real clusters; default SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=1500, help="simulated, per load")
    parser.add_argument("--profile", default="a100-8b", help="simulated hardware")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write OUT, and .md beside it")
    args = parser.parse_args(argv)
    if min(args.turns, args.requests) < 1:
        parser.error("--turns and --requests must be at least 1")
    found: Any
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            if args.real:
                task = bar.add_task("", total=len(real.MODES) + args.turns)
                with tempfile.TemporaryDirectory() as scratch:
                    model = args.model or prepare_smollm2()
                    found = asyncio.run(
                        real.measure(
                            *(model, args.turns, Path(scratch)),
                            lambda doing: bar.update(task, advance=1, description=doing),
                        )
                    )
                text = real_table(found)
            else:
                task = bar.add_task("simulating", total=len(simulated.LOADS) * len(simulated.SHAPES))
                found = simulated.measure(args.requests, args.seed, args.profile, lambda: bar.advance(task))
                text = simulated_table(found)
    except SageError as err:
        print(f"sagellm bench disaggregation: {err.message}", file=sys.stderr)
        return 2
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
