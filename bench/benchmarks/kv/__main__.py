"""`sagellm bench kv --trace FILE`: hit rates of all eviction policies at all cache sizes, beside Belady's optimum."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.progress import Progress

from bench.benchmarks.kv.replay import Trace, belady, ceiling, load_mooncake, replay
from bench.plots import lines
from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.eviction import EVICTION, make_eviction

SIZES = "1%,2%,5%,10%,20%,30%,50%,75%,100%"
OURS = "cost-aware"
BELADY = "belady"

Rows = list[dict[str, object]]


def sizes(text: str, unique_blocks: int) -> list[int]:
    """Numbers of blocks, or percentages of the trace's different blocks. Raises ConfigError."""
    found = set()
    for part in text.split(","):
        try:
            size = int(unique_blocks * float(part[:-1]) / 100) if part.endswith("%") else int(part)
        except ValueError:
            size = 0
        if size < 1:
            raise ConfigError(
                f"--sizes {part!r}: give numbers of blocks, or percentages such as 5%, of at least a block"
            )
        found.add(size)
    return sorted(found)


def measure(trace: Trace, capacities: list[int], progress: Progress) -> Rows:
    rows: Rows = []
    task = progress.add_task("replaying", total=len(capacities) * (1 + len(list(EVICTION))))
    for capacity in capacities:
        rows.append({"policy": BELADY, "capacity_blocks": capacity, "hit_rate": belady(trace, capacity)})
        progress.advance(task)
        for name in EVICTION:
            found = replay(trace, capacity, make_eviction(name, capacity))
            rows.append(
                {
                    "policy": name,
                    "capacity_blocks": capacity,
                    "hit_rate": found.hit_rate,
                    "decision_us": found.decision_us,
                }
            )
            progress.advance(task)
    return rows


def by_policy(rows: Rows) -> Mapping[str, Mapping[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(str(row["policy"]), {})[int(str(row["capacity_blocks"]))] = float(str(row["hit_rate"]))
    return found


def markdown(rows: Rows, title: str) -> str:
    rates = by_policy(rows)
    capacities = list(rates[BELADY])
    slowest = {
        name: max(float(str(row["decision_us"])) for row in rows if row["policy"] == name) for name in sorted(EVICTION)
    }
    head = ["policy", *(f"{capacity:,}" for capacity in capacities), "µs per block, slowest"]
    body = [[BELADY, *(f"{rates[BELADY][c]:.1%}" for c in capacities), ""]]
    for name in sorted(EVICTION, key=lambda name: -sum(rates[name].values())):
        cells = (f"{rates[name][c]:.1%} ({_share(rates[name][c], rates[BELADY][c])})" for c in capacities)
        body.append([name, *cells, f"{slowest[name]:.1f}"])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    table = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *body]
    ]
    table.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([f"{title}; hit rate of blocks by cache size in blocks (share of Belady's)", "", *table])


def _share(rate: float, best: float) -> str:
    return f"{rate / best:.2f}" if best else "–"


def main() -> int:
    parser = argparse.ArgumentParser("sagellm bench kv", description=__doc__.partition(": ")[2])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--format", choices=["mooncake"], default="mooncake", help="lines with hash_ids")
    parser.add_argument("--sizes", default=SIZES, help=f"blocks, or %% of the trace's blocks; default {SIZES}")
    parser.add_argument("--json", type=Path, help="rows go here; the table (.md) and the plot (.png) beside it")
    args = parser.parse_args()
    try:
        trace = load_mooncake(args.trace)
        unique = len({block for path in trace for block in path})
        capacities = sizes(args.sizes, unique)
    except ConfigError as err:
        print(f"sagellm bench kv: {err}", file=sys.stderr)
        return 2
    with Progress(transient=True) as progress:
        rows = measure(trace, capacities, progress)
    best = ceiling(trace)
    title = f"{args.trace.name}: {len(trace):,} requests, {unique:,} different blocks, at most {best:.1%} can hit"
    print(markdown(rows, title))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(markdown(rows, title) + "\n")
        rates = by_policy(rows)
        curves = {name: {c / unique: rate for c, rate in found.items()} for name, found in rates.items()}
        curves["nothing forgotten"] = dict.fromkeys(curves[BELADY], best)
        panel = "hit rate by cache size, as a share of all blocks"
        lines({panel: curves}, title.replace(": ", "\n").replace(", at", ",\nat"), args.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
