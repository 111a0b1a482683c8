"""`sagellm bench router`: what the router and the gateway cost per request and per token, and what they add.

Real router and gateway processes over mock workers on the real wire; beside them, in the same rounds and under the same
load, a bare Python proxy and (--sglang-venv) sglang-router over a mock HTTP worker.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import uvloop

from bench.benchmarks.router import report
from bench.benchmarks.router.measure import PROMPT_TOKENS, Load, contestants, measure
from services.cli.models import prepare_smollm2

RESULTS = Path(__file__).resolve().parents[2] / "results"


def loads_of(scale: float, paced_tokens: int) -> dict[str, Load]:
    return {
        report.REQUESTS: Load(32, max(64, round(1500 * scale)), 2),
        report.ALONE: Load(1, max(20, round(200 * scale)), 2),
        report.PACED: Load(32, 32, paced_tokens),
    }


async def bench(args: argparse.Namespace) -> int:
    model = args.model or prepare_smollm2()
    loads = loads_of(args.scale, args.paced_tokens)
    skipped: dict[str, str] = {}
    only = set(args.only.split(",")) if args.only else None
    with tempfile.TemporaryDirectory(prefix="sagellm-bench-") as scratch:
        async with contestants(model, args.interval_ms, args.sglang_venv, Path(scratch), skipped) as entered:
            chosen = [c for c in entered if only is None or c.name in only or any(c.name == o.base for o in entered)]
            say = (lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr)) if sys.stderr.isatty() else _silent
            found = await measure(chosen, loads, args.rounds, say)
    table = list(report.rows(found, chosen))
    conditions = (
        f"{args.rounds} rounds, interleaved, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; prompts "
        f"of {PROMPT_TOKENS} tokens; requests: {loads[report.REQUESTS].lines} at a time, of 2 tokens; paced: "
        f"{loads[report.PACED].lines} streams of {args.paced_tokens} tokens, one each {args.interval_ms:g} ms"
    )
    text = report.markdown(table, conditions, skipped)
    print(f"\r\x1b[K{text}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    rounds = {load: {name: [asdict(r) for r in rs] for name, rs in by.items()} for load, by in found.rounds.items()}
    result = {"conditions": conditions, "skipped": skipped, "rows": [asdict(row) for row in table], "rounds": rounds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    report.plot(table, conditions, args.out.with_suffix(".png"))
    return 0


def _silent(text: str) -> None: ...


def main() -> int:
    parser = argparse.ArgumentParser(prog="sagellm bench router", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="requests per round, times this")
    parser.add_argument("--paced-tokens", type=int, default=100)
    parser.add_argument("--interval-ms", type=float, default=10.0)
    parser.add_argument("--only", default="", metavar="NAME,…", help="contestants (and what they are compared with)")
    parser.add_argument("--sglang-venv", type=Path, help="environment in which sglang-router is installed")
    parser.add_argument("--model", type=Path, help="whose tokenizer the gateway uses; default: SmolLM2")
    parser.add_argument("--out", type=Path, default=RESULTS / "router.json")
    return uvloop.run(bench(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
