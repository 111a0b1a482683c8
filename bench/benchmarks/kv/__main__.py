"""`sagellm bench kv --trace FILE`: hit rates of all eviction policies at all cache sizes, beside Belady's optimum."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.progress import Progress

from bench.benchmarks.kv.oracles import KnowsUses, KnowsWindow
from bench.benchmarks.kv.replay import Trace, belady, ceiling, load_mooncake, replay
from bench.plots import lines
from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.eviction import EVICTION, make_eviction
from sagellm_common.kv_policy.eviction.cost_aware import CostAware

SIZES = "1%,2%,5%,10%,20%,30%,50%,75%,100%"
OURS = "adaptive"
BELADY, INFINITE = "belady", "infinite"
KNOWS_USES, KNOWS_WINDOW = "oracle-uses", "oracle-window"
REFERENCES = {
    INFINITE: "a cache that forgets nothing",
    BELADY: "knows all of the future (an upper bound: it need not keep a block's parents, and turns out to)",
    KNOWS_USES: "knows how often each block is used again, not when; of those that are, the least recent goes",
    KNOWS_WINDOW: "knows the next accesses, as many as the cache has blocks, and nothing beyond",
}
TARGET_SHARE, TELLING_RATE = 0.95, 0.10
"""Of Belady's hits, wherever these are at least so many."""

Rows = list[dict[str, object]]


def sizes(text: str, unique_blocks: int) -> list[int]:
    """Numbers of blocks, or percentages of the trace's different blocks. Raises ConfigError."""
    found = set()
    for part in text.split(","):
        try:
            share = float(part[:-1]) / 100 if part.endswith("%") else 0.0
            size = max(1, int(unique_blocks * share)) if share > 0 else int(part)
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
    task = progress.add_task("replaying", total=len(capacities) * (len(REFERENCES) + len(list(EVICTION))))

    def add(policy: str, capacity: int, hit_rate: float, decision_us: float = 0.0) -> None:
        row: dict[str, object] = {
            "policy": policy,
            "capacity_blocks": capacity,
            "hit_rate": hit_rate,
            "decision_us": decision_us,
        }
        rows.append(row)
        progress.advance(task)

    best = ceiling(trace)
    for capacity in capacities:
        add(INFINITE, capacity, best)
        add(BELADY, capacity, belady(trace, capacity))
        add(KNOWS_USES, capacity, replay(trace, capacity, KnowsUses(trace)).hit_rate)
        add(KNOWS_WINDOW, capacity, replay(trace, capacity, KnowsWindow(trace, capacity)).hit_rate)
        for name in EVICTION:
            policy = make_eviction(name, capacity)
            found = replay(trace, capacity, policy)
            add(name, capacity, found.hit_rate, found.decision_us)
            if isinstance(policy, CostAware):
                rows[-1]["lifetime_skill"] = policy.lifetimes.skill
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
    body = [[name, *(_cell(rates, name, c) for c in capacities), ""] for name in REFERENCES]
    body += [
        [name, *(_cell(rates, name, c) for c in capacities), f"{slowest[name]:.1f}"]
        for name in sorted(EVICTION, key=lambda name: -sum(rates[name].values()))
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    table = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *body]
    ]
    table.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    told = [f"- {name}: {what}" for name, what in REFERENCES.items()]
    first = f"{title}; hit rate of blocks by cache size in blocks (share of Belady's)"
    skills = [float(str(row["lifetime_skill"])) for row in rows if row["policy"] == OURS]
    foretold = (
        f"Whether a block is used again, {OURS} foretells with a Brier skill of {min(skills):.2f} to {max(skills):.2f} "
        "(1: knows it, 0: knows the average)."
    )
    return "\n".join([first, "", *table, "", *told, "", *verdict(rates), "", foretold])


def verdict(rates: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Where ours reaches its share of Belady's, who beats it, and which knowledge the rest would need."""
    telling = [c for c, rate in rates[BELADY].items() if rate >= TELLING_RATE]
    short = [c for c in telling if rates[OURS][c] < TARGET_SHARE * rates[BELADY][c]]
    others = [name for name in EVICTION if name != OURS]
    behind = [f"{name} at {c:,} blocks" for c in telling for name in others if rates[name][c] > rates[OURS][c]]
    lines = [
        f"{OURS} has at least {TARGET_SHARE:.0%} of Belady's hits at {len(telling) - len(short)} of {len(telling)} "
        f"sizes (those where Belady hits {TELLING_RATE:.0%} or more); ahead of it: {', '.join(behind) or 'none'}."
    ]
    for c in short:
        uses, window, best, ours = (rates[name][c] for name in (KNOWS_USES, KNOWS_WINDOW, BELADY, OURS))
        lines.append(
            f"- {c:,} blocks: {best - ours:.1%} short of Belady's; whoever knew which blocks are used again would hit "
            f"{uses:.1%}, whoever knew the next {c:,} accesses {window:.1%}; the rest needs both, further ahead."
        )
    return lines


def _cell(rates: Mapping[str, Mapping[int, float]], name: str, capacity: int) -> str:
    return f"{rates[name][capacity]:.1%} ({_share(rates[name][capacity], rates[BELADY][capacity])})"


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
        panel = "hit rate by cache size, as a share of all blocks"
        lines({panel: curves}, title.replace(": ", "\n").replace(", at", ",\nat"), args.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
