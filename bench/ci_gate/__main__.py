"""`python -m bench.ci_gate --baseline A --current B`: whether B is slower than A. Exit code 1 where it is.

A and B are directories or git revisions, whose `bench run --preset` then takes turns on this machine; or results of
such runs (`--json` of either), which are compared as they are. What decides is the interval of the ratio of the two
rounds of a pair, so a machine that is slow for a while, or noisy throughout, does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ci_gate.judge import MIN_ROUNDS, RULES, Finding, Round, judge
from bench.ci_gate.trees import TurnFailed, build, runner, tree
from sagellm_common.core.errors import ConfigError

EXIT_WORSE, EXIT_USAGE, EXIT_FAILED = 1, 2, 3
Pairs = tuple[list[Round], list[Round]]


async def in_pairs(args: argparse.Namespace, roots: Sequence[Path], peak_flops: float) -> Pairs:
    """(baseline's, current's) rounds. Who goes first alternates."""
    sides: Pairs = ([], [])
    async with AsyncExitStack() as stack:
        runners = [
            await stack.enter_async_context(runner(name, root, args.preset, peak_flops, extra))
            for name, root, extra in zip(
                ("baseline", "current"), roots, (pairs_of(args.baseline_env), pairs_of(args.current_env)), strict=True
            )
        ]
        for number in range(args.rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                sides[side].append(await runners[side].round(number))
            print(f"pair {number + 1}/{args.rounds}", file=sys.stderr, flush=True)
    return sides


def pairs_of(settings: Sequence[str]) -> dict[str, str]:
    """Raises ConfigError."""
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"{setting!r}: write environment as NAME=VALUE")
    return dict(setting.split("=", 1) for setting in settings)


def read(path: Path) -> list[Round]:
    """Rounds of `bench run`. Raises ConfigError."""
    try:
        rounds: list[Round] = json.loads(path.read_bytes())["rounds"]
        missing = {rule.metric for rule in RULES} - {name for found in rounds for name in found}
        if missing or not rounds:
            raise ValueError(f"there are {len(rounds)} rounds, without {', '.join(sorted(missing)) or 'lack'}")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"{path}: {err!r}; `python -m bench run --preset ci --json {path}` writes one") from err
    return rounds


def measure(args: argparse.Namespace) -> Pairs:
    """Raises ConfigError, TurnFailed."""
    names = args.baseline, args.current
    files = [Path(name) for name in names if Path(name).is_file()]
    if len(files) == 1:
        raise ConfigError("--baseline and --current: two results or two trees; a result was not measured beside a tree")
    if files:
        baseline, current = map(read, files)
        if len(baseline) != len(current):
            raise ConfigError(
                f"{files[0]} has {len(baseline)} rounds, {files[1]} {len(current)}; compare equal numbers"
            )
        return baseline, current
    if args.rounds < MIN_ROUNDS:
        raise ConfigError(f"--rounds {args.rounds}: at least {MIN_ROUNDS} are needed to tell anything")
    from bench.presets import measured_peak_flops

    with ExitStack() as stack:
        roots = [stack.enter_context(tree(name)) for name in names]
        for root in roots:
            build(root)
        return asyncio.run(in_pairs(args, roots, args.peak_flops or measured_peak_flops()))


def markdown(findings: Sequence[Finding], names: tuple[str, str]) -> str:
    lines = [
        f"`{names[1]}` over `{names[0]}`, {findings[0].ratio.count} pairs of rounds",
        "",
        "| metric | ratio (median) | interval | may be | verdict |",
        "|---|---|---|---|---|",
    ]
    for found in findings:
        bound = "≥" if found.rule.more_is_better else "≤"
        low, high = found.ratio.low, found.ratio.high
        lines.append(
            f"| {found.rule.metric} | {found.ratio.value:.4f} | {low:.4f} – {high:.4f} | {bound} {found.rule.limit:g} "
            f"| {found.verdict} |"
        )
    return "\n".join(lines) + "\n"


def document(findings: Sequence[Finding], pairs: Pairs, args: argparse.Namespace) -> dict[str, Any]:
    rows: list[Mapping[str, Any]] = [
        {**asdict(found.rule), **asdict(found.ratio), "verdict": found.verdict} for found in findings
    ]
    return {
        "baseline": args.baseline,
        "current": args.current,
        "preset": args.preset,
        "cores": os.cpu_count(),
        "findings": rows,
        "rounds": {"baseline": pairs[0], "current": pairs[1]},
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m bench.ci_gate", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--baseline", required=True, metavar="TREE|REVISION|JSON")
    made.add_argument("--current", default=".", metavar="TREE|REVISION|JSON")
    made.add_argument("--preset", default="ci")
    made.add_argument("--rounds", type=int, default=15, help="pairs of rounds")
    made.add_argument("--peak-flops", type=float, default=0.0, help="of one core, for MFU; 0: measured")
    made.add_argument("--baseline-env", action="append", default=[], metavar="NAME=VALUE", help="of the baseline alone")
    made.add_argument(
        "--current-env", action="append", default=[], metavar="NAME=VALUE", help="of the current tree alone"
    )
    made.add_argument("--json", type=Path, help="findings and rounds; Markdown beside it")
    return made


def main() -> int:
    args = parser().parse_args()
    try:
        pairs = measure(args)
        findings = judge(*pairs)
    except (ConfigError, ValueError) as err:
        print(f"ci_gate: {err.message if isinstance(err, ConfigError) else err}", file=sys.stderr)
        return EXIT_USAGE
    except TurnFailed as err:
        print(f"ci_gate: {err}", file=sys.stderr)
        return EXIT_FAILED
    text = markdown(findings, (args.baseline, args.current))
    print(text, end="")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document(findings, pairs, args), indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text)
    worse = [found.rule.metric for found in findings if found.verdict == "WORSE"]
    if worse:
        print(f"ci_gate: worse than {args.baseline}: {', '.join(worse)}", file=sys.stderr)
    return EXIT_WORSE if worse else 0


if __name__ == "__main__":
    sys.exit(main())
