"""`python -m bench run --preset ci --json OUT`: a preset on a cluster of its own; JSON, and Markdown beside it.

With `--turns` it serves a gate: it says when it is ready, then runs a round for each number that comes on its input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from bench.presets import METRICS, PRESETS, Round, measured_peak_flops, medians, serving
from sagellm_common.core.errors import ConfigError
from services.cli.cluster import StartFailed

FORMAT = 1
EXIT_FAILED, EXIT_USAGE = 1, 2


async def run_rounds(preset: str, count: int, peak_flops: float) -> list[Round]:
    async with serving(PRESETS[preset], peak_flops) as served:
        rounds = []
        for number in range(count):
            rounds.append(found := await served.round(number))
            shown = f"TTFT p50 {found.ttft_p50_ms:.1f} ms, TPOT p50 {found.tpot_p50_ms:.2f} ms"
            print(f"round {number + 1}/{count}: {shown}", file=sys.stderr, flush=True)
    return rounds


async def take_turns(preset: str, peak_flops: float) -> None:
    """A line {"ready": true}, then a round as a line of JSON for each number read; until the input ends."""
    async with serving(PRESETS[preset], peak_flops) as served:
        print(json.dumps({"ready": True, "format": FORMAT}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(asdict(await served.round(int(line)))), flush=True)


def document(preset: str, rounds: list[Round], peak_flops: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "preset": preset,
        "conditions": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "peak_flops": peak_flops,
            **asdict(PRESETS[preset]),
        },
        "metrics": medians(rounds),
        "rounds": [asdict(found) for found in rounds],
    }


def markdown(found: dict[str, Any]) -> str:
    rows, cores = found["rounds"], found["conditions"]["cores"]
    lines = [
        f"`bench run --preset {found['preset']}`: {len(rows)} rounds, one thread per engine, {cores} cores",
        "",
        "| metric | median | least | most |",
        "|---|---|---|---|",
    ]
    for name in METRICS:
        values = [row[name] for row in rows]
        lines.append(f"| {name} | {found['metrics'][name]:.4g} | {min(values):.4g} | {max(values):.4g} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench run", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--preset", choices=[*PRESETS], default="ci")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("bench-run.json"))
    parser.add_argument("--peak-flops", type=float, default=0.0, help="of one core, for MFU; 0: measured")
    parser.add_argument("--turns", action="store_true", help="rounds by number from standard input, for bench.ci_gate")
    args = parser.parse_args(argv)
    if args.rounds < 1 or not args.peak_flops >= 0:
        parser.error("--rounds must be at least 1, --peak-flops at least 0")
    try:
        peak_flops = args.peak_flops or measured_peak_flops()
        if args.turns:
            uvloop.run(take_turns(args.preset, peak_flops))
            return 0
        found = document(args.preset, uvloop.run(run_rounds(args.preset, args.rounds, peak_flops)), peak_flops)
    except ConfigError as err:
        print(f"bench run: {err.message}", file=sys.stderr)
        return EXIT_USAGE
    except StartFailed as err:
        print(f"bench run: {err}: {' '.join(err.tail)}", file=sys.stderr)
        return EXIT_FAILED
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    args.json.with_suffix(".md").write_text(markdown(found))
    print(markdown(found), end="")
    return 0
