"""`sagellm bench chat`: a multi-turn chat of many users on 2P2D, with the KV stack on and off, in turns.

    sagellm bench chat [--users 20] [--turns 4] [--quick] [--kill] [--json OUT]

On: prefix caches and two kv_stores with two replicas of everything; off: neither. The conversations are decided by the
seed, both arms must generate the same tokens. With --kill each part of the cluster with the stack is killed once and
started again, workers and stores while requests run there.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.benchmarks.chat.measure import OFF, ON, Measured, Workload, measure, rows
from bench.plots import grouped_bars
from services.cli.models import prepare_smollm2, prepare_tiny

QUICK = Workload(users=6, turns=3, answer_tokens=16, num_blocks=512)


def markdown(found: Sequence[Mapping[str, Any]], title: str) -> str:
    head = [
        "turn",
        "stack",
        "TTFT p50 ms",
        "p95",
        "prompt tokens",
        "hit",
        "from the stores",
        "on decode already",
        "KV moved MB",
    ]
    body = [
        [
            *(f"{row[name]}" for name in ("turn", "stack", "ttft_p50_ms", "ttft_p95_ms", "prompt_tokens")),
            *(f"{row[name]:.1%}" for name in ("hit_rate", "store_rate", "decode_held_rate")),
            f"{row['kv_bytes_moved'] / 1e6:.1f}",
        ]
        for row in found
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in [head, *body]]
    table.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([title, "", *table])


def plot(found: Sequence[Mapping[str, Any]], title: str, out: Path) -> None:
    def panel(name: str, scale: float, arms: Sequence[str] = (ON, OFF)) -> dict[str, dict[str, float]]:
        return {
            f"stack {arm}": {f"turn {row['turn']}": scale * row[name] for row in found if row["stack"] == arm}
            for arm in arms
        }

    panels = {
        "TTFT p50 (ms)": panel("ttft_p50_ms", 1.0),
        "TTFT p95 (ms)": panel("ttft_p95_ms", 1.0),
        "prompt tokens not computed (%)": panel("hit_rate", 100.0),
        "KV moved to decode (MB)": panel("kv_bytes_moved", 1e-6),
    }
    grouped_bars(panels, title, out)


def verdict(found: Measured) -> str:
    if found.differing:
        pairs = ", ".join(f"user {user} turn {turn + 1}" for user, turn in found.differing)
        return f"tokens DIFFER between stack on and off: {pairs}"
    count = sum(len(answers) for answers in found.answers[ON])
    return f"all {count} answers have the same tokens with the stack on and off"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("sagellm bench chat", description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--users", type=int, help=f"default {Workload.users}")
    parser.add_argument("--turns", type=int, help=f"default {Workload.turns}")
    parser.add_argument("--seed", type=int, help="decides the conversations")
    parser.add_argument("--model", type=Path, help="checkpoint with a chat template; default SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and few users")
    parser.add_argument("--kill", action="store_true", help="kill -9 each part once, between and during turns")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write OUT, and .md and .png beside it")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("users", "turns", "seed") if getattr(args, name) is not None}
    for name in ("users", "turns"):
        if given.get(name, 2) < (least := 2 if args.kill and name == "turns" else 1):
            parser.error(f"--{name} is {given[name]}, but must be at least {least}")
    load = replace(QUICK if args.quick else Workload(), **given)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True), transient=True) as bar:
        model = args.model or (prepare_tiny("llama", Path(scratch) / "tiny-llama") if args.quick else prepare_smollm2())
        task = bar.add_task("", total=2 + 2 * load.turns)

        def progress(doing: str) -> None:
            bar.console.print(f"[{time.monotonic() - began_s:5.0f} s] {doing}", markup=False, highlight=False)
            bar.update(task, advance=0 if doing.startswith("kill") else 1, description=doing)

        found = asyncio.run(measure(model, load, kill=args.kill, scratch=Path(scratch), progress=progress))
    made = rows(found)
    killed = f"; killed on the way: {', '.join(found.killed)}" if found.killed else ""
    title = f"{load.users} users, {load.turns} turns, {model.name} on 2P2D, two stores with two replicas{killed}"
    print(f"{markdown(made, title)}\n\n{verdict(found)}")
    if args.json:
        conditions = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "model": model.name,
            "seconds": round(time.monotonic() - began_s),
            **asdict(load),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"conditions": conditions, "killed": found.killed, "equal": not found.differing, "rows": made}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(f"{markdown(made, title)}\n\n{verdict(found)}\n")
        plot(made, title, args.json.with_suffix(".png"))
    return 1 if found.differing else 0


if __name__ == "__main__":
    sys.exit(main())
