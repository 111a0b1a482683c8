"""`sagellm simulate`: a trace through the production scheduler on simulated engines."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.sim.cluster import Outcome, SimCluster, Slo
from bench.sim.peers import PEERS
from bench.sim.profile import PROFILES, Profile, load_profile
from bench.sim.report import ATTAINMENT, goodput, summary
from bench.sim.traces import FORMATS, SimRequest, generated, load_trace, scaled
from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.eviction import EVICTION
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.strategies import STRATEGIES, Strategy, make_strategy

SHOWN_REQUESTS = 100
DRAWN = {"poisson": 1.0, "bursty": 16.0}
"""Workloads drawn instead of read, and the squared coefficient of variation of their gaps."""


def strategy_maker(name: str) -> Callable[[CostModel], Strategy]:
    """One of ours, or of the peers' rules. Raises ConfigError listing both."""
    if name in PEERS:
        return PEERS[name]
    if name not in STRATEGIES:
        raise ConfigError(f"--strategy {name!r}: known are {', '.join([*STRATEGIES, *PEERS])}")
    return lambda costs: make_strategy(name, costs)


def workload(args: argparse.Namespace) -> list[SimRequest]:
    if args.format in DRAWN:
        return generated(
            args.requests,
            args.rate_rps * args.rate_scale,
            seed=args.seed,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
            burstiness=DRAWN[args.format],
            shared_prefixes=args.shared_prefixes,
        )
    if args.trace is None:
        raise ConfigError(f"--format {args.format} needs --trace FILE")
    return scaled(load_trace(args.trace, args.format), args.rate_scale)


def check_targets(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the option."""
    for name in ("slo_ttft_ms", "slo_tpot_ms", "rate_scale", "rate_rps", "requests", "prompt_tokens", "output_tokens"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    EVICTION.get(args.eviction)


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the option."""
    check_targets(args)
    if args.prefill < 0 or args.decode < 1:
        raise ConfigError(f"--prefill {args.prefill} --decode {args.decode}: at least one decode worker is needed")


def print_table(result: dict[str, object], title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in result.items():
        table.add_row(key, _text(value))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "   ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "–")


def add_workload(made: argparse.ArgumentParser) -> None:
    """What is replayed, on what, and what is wanted of it."""
    made.add_argument("--trace", type=Path)
    made.add_argument("--format", choices=[*FORMATS, *DRAWN], default="mooncake")
    made.add_argument("--strategy", default="hybrid", help=f"one of {', '.join([*STRATEGIES, *PEERS])}")
    made.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    made.add_argument("--slo-tpot-ms", type=float, default=50.0)
    made.add_argument("--rate-scale", type=float, default=1.0, help="2: the same requests, twice as often")
    made.add_argument("--profile", default="h200-8b", help=f"{', '.join(PROFILES)}, or a file of `bench calibrate`")
    made.add_argument("--eviction", default="cost-aware", help=f"one of {', '.join(EVICTION)}")
    made.add_argument("--seed", type=int, default=0)
    drawn = made.add_argument_group("poisson and bursty workloads")
    drawn.add_argument("--requests", type=int, default=10_000)
    drawn.add_argument("--rate-rps", type=float, default=10.0)
    drawn.add_argument("--prompt-tokens", type=float, default=1024.0, help="mean")
    drawn.add_argument("--output-tokens", type=float, default=128.0, help="mean")
    drawn.add_argument("--shared-prefixes", type=int, default=0)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("sagellm simulate", description=(__doc__ or "").partition(": ")[2])
    add_workload(made)
    made.add_argument("--prefill", type=int, default=1, metavar="N", help="0: decode workers compute prompts")
    made.add_argument("--decode", type=int, default=1, metavar="M")
    made.add_argument("--no-goodput", action="store_true", help="this rate only, without the search for the highest")
    made.add_argument("--json", type=Path)
    return made


def simulate(args: argparse.Namespace) -> dict[str, object]:
    check(args)
    make, profile, slo = strategy_maker(args.strategy), load_profile(args.profile), slo_of(args)
    requests = workload(args)

    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(requests))

        def run(requests: Sequence[SimRequest], max_misses: float = math.inf) -> Outcome:
            span_s = requests[-1].arrival_s - requests[0].arrival_s
            rate = f"{len(requests) / span_s:,.2f} a second" if span_s else "all at once"
            progress.reset(task, description=f"{len(requests):,} requests, {rate}")
            arrived = every(SHOWN_REQUESTS, lambda: progress.advance(task, SHOWN_REQUESTS))
            return cluster(profile, args, make, slo, max_misses).run(requests, arrived)

        result: dict[str, Any] = summary(run(requests), slo, args.prefill + args.decode)
        found: float | None = None
        if not args.no_goodput:
            own = result["slo_attainment"]
            found = goodput(requests, lambda scaled: run(scaled, (1 - ATTAINMENT) * len(requests)), slo, own)
    return {"goodput_rps": found, **result}


def every(count: int, act: Callable[[], None]) -> Callable[[], None]:
    """Acts at each so-many-th call: a progress bar costs more than a simulated request."""
    calls = itertools.count(1)

    def called() -> None:
        if next(calls) % count == 0:
            act()

    return called


def cluster(
    profile: Profile,
    args: argparse.Namespace,
    make: Callable[[CostModel], Strategy],
    slo: Slo,
    max_misses: float = math.inf,
) -> SimCluster:
    return SimCluster(
        profile, args.prefill, args.decode, make, slo, eviction=args.eviction, max_misses=max_misses, seed=args.seed
    )


def slo_of(args: argparse.Namespace) -> Slo:
    return Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)


def main() -> int:
    args = parser().parse_args()
    try:
        result = simulate(args)
    except ConfigError as err:
        print(f"sagellm simulate: {err.message}", file=sys.stderr)
        return 2
    title = (
        f"{args.trace.name if args.trace else args.format} ×{args.rate_scale:g}, {args.strategy}, "
        f"{args.prefill}P{args.decode}D of {args.profile}; targets: TTFT {args.slo_ttft_ms:g} ms, TPOT "
        f"{args.slo_tpot_ms:g} ms for {ATTAINMENT:.0%} of all offered"
    )
    print_table(result, title)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
