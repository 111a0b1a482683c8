"""`sagellm bench calibrate`: a profile of the simulator from a real CPU cluster, and how true it then is.

Rounds of requests go through a cluster on this machine, in turns to learn from and to check by. From the first come
costs (the router's own model, of what the engines tell) and the profile; the others are foretold: their steps by the
cost model, their times by the simulator, from the same arrivals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.benchmarks.calibrate.compare import TARGET, Distance, distance
from bench.benchmarks.calibrate.fit import Foretold, foretold, learned, links_foretold, on_a_core, profile_of
from bench.benchmarks.calibrate.measure import RealCluster, Served, real_cluster
from bench.plots import lines
from bench.sim.__main__ import strategy_maker
from bench.sim.cluster import SimCluster, Slo
from bench.sim.profile import Profile
from bench.sim.traces import SimRequest, generated
from bench.sim.workers import Job
from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, SageError
from sagellm_common.core.step_costs import StepCost
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.cli.cluster import StartFailed
from services.cli.models import prepare_smollm2

MAPE_TARGET = 0.10
UTILISATION = 0.6
"""Of the prefill workers, where no rate is given."""
ALONE = 6
"""Requests one after the other, first of all: they warm up, and tell the pace."""
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 1500, 200
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Round = tuple[list[Served], list[StepCost]]


def requests_of(args: argparse.Namespace, rate_rps: float, seed: int) -> list[SimRequest]:
    count = max(2, round(rate_rps * args.seconds))
    drawn = generated(count, rate_rps, seed=seed, prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens)
    return [
        replace(
            request,
            prompt_tokens=min(request.prompt_tokens, MAX_PROMPT_TOKENS),
            output_tokens=min(max(3, request.output_tokens), MAX_OUTPUT_TOKENS),
        )
        for request in drawn
    ]


async def one_after_the_other(real: RealCluster, args: argparse.Namespace) -> list[Served]:
    sizes = [max(16, round(args.prompt_tokens * (i + 1) / (ALONE / 2))) for i in range(ALONE)]
    served = []
    for seed, tokens in enumerate(sizes):
        request = SimRequest(0.0, min(tokens, MAX_PROMPT_TOKENS), 8)
        served += await real.serve([request], seed)
    return served


def pace_rps(served: Sequence[Served], args: argparse.Namespace) -> float:
    per_token_s = statistics.median(s.summary.prefill_engine_ms / 1e3 / s.request.prompt_tokens for s in served)
    return float(UTILISATION * args.prefill / (per_token_s * args.prompt_tokens))


async def measure(config: Config, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    task = progress.add_task("starting the cluster", total=args.rounds + 1)
    async with real_cluster(config, args.prefill, args.decode) as real:
        progress.update(task, description="one after the other", advance=0)
        alone = (await one_after_the_other(real, args))[1:]
        rate_rps = args.rate_rps or pace_rps(alone, args)
        progress.advance(task)
        rounds: list[Round] = []
        for number in range(args.rounds):
            progress.update(task, description=f"{rate_rps:.2f} requests/s, round {number + 1} of {args.rounds}")
            real.steps.clear()
            served = await real.serve(requests_of(args, rate_rps, seed=args.seed + number), seed=100 + number)
            rounds.append((served, list(real.steps)))
            progress.advance(task)
        model, blocks = real.workers[0].record.model, real.workers[0].kv.total_blocks
    assert model is not None, "prefill and decode workers have a model"
    learn, check = rounds[0::2], rounds[1::2]
    steps = [step for _, told in learn for step in told]
    unseen = [step for _, told in check for step in told]
    costs = learned(steps, (one for served, _ in learn for one in served))
    clean = learned(on_a_core(steps), ())
    return {
        "rate_rps": rate_rps,
        "costs": costs,
        "profile": profile_of(
            costs, steps, alone, [one for served, _ in learn for one in served], config, model, blocks
        ),
        "foretold": foretold(costs, unseen) + links_foretold(costs, (one for served, _ in check for one in served)),
        "on_a_core": foretold(clean, on_a_core(unseen)),
        "check": [served for served, _ in check],
        "steps": [asdict(step) for _, told in rounds for step in told],
    }


def replay(profile: Profile, costs: CostModel, served: Sequence[Served], args: argparse.Namespace) -> list[Job]:
    """The same arrivals, simulated."""
    slo = Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)
    cluster = SimCluster(
        profile,
        args.prefill,
        args.decode,
        strategy_maker(args.strategy),
        slo,
        block_tokens=16,
        costs=CostModel.from_dict(costs.to_dict()),
    )
    return cluster.run([one.request for one in served]).jobs


def validate(
    found: dict[str, Any], args: argparse.Namespace
) -> tuple[list[Distance], dict[str, dict[str, dict[float, float]]]]:
    """Distances over all rounds to check by, and the quantiles of both sides."""
    jobs = [job for served in found["check"] for job in replay(found["profile"], found["costs"], served, args)]
    served = [one for served in found["check"] for one in served]
    metrics = {
        "TTFT": (
            [one.ttft_s for one in served],
            [job.first_token_s - job.request.arrival_s for job in jobs],
        ),
        "TPOT": (
            [one.tpot_s for one in served],
            [job.tpot_s for job in jobs],
        ),
    }
    distances = [distance(name, *values) for name, values in metrics.items()]
    panels = {
        f"{name} in ms by share of requests": {
            side: {share: 1e3 * statistics.quantiles(values, n=100)[round(100 * share) - 1] for share in SHARES}
            for side, values in zip(("measured", "simulated"), both, strict=True)
        }
        for name, both in metrics.items()
    }
    return distances, panels


def print_tables(
    distances: Sequence[Distance], parts: Sequence[Foretold], clean: Sequence[Foretold], title: str
) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("", "measured p50 ms", "simulated", "error", "measured p95 ms", "simulated", "error", "all quantiles"):
        table.add_column(name, justify="right")
    for d in distances:
        table.add_row(
            *(d.metric, f"{d.measured_p50_ms:.1f}", f"{d.simulated_p50_ms:.1f}", f"{d.p50_error:.1%}"),
            *(f"{d.measured_p95_ms:.1f}", f"{d.simulated_p95_ms:.1f}", f"{d.p95_error:.1%}"),
            f"{d.distribution_error:.1%}",
        )
    steps = Table(title=f"steps not learned from; target: MAPE ≤ {MAPE_TARGET:.0%}", title_justify="left")
    for name in ("part", "steps", "MAPE", "median error", "MAPE on a core", "median error"):
        steps.add_column(name, justify="right")
    alone = {part.part: part for part in clean}
    for part in parts:
        beside = alone.get(part.part)
        steps.add_row(*_cells(part), *(_cells(beside)[2:] if beside else ("–", "–")))
    console = Console()
    console.print(table)
    console.print(steps)


def _cells(part: Foretold) -> tuple[str, ...]:
    return part.part, str(part.steps), f"{part.mape:.1%}", f"{part.median:.1%}"


def config_of(args: argparse.Namespace, model: Path, costs: Path) -> Config:
    """Raises ConfigError."""
    return Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": "calibrate"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": 2048, "threads": 1, "weights": args.weights},
            "router": {
                "strategy": args.strategy,
                "cost_model_path": str(costs),
                "ttft_target_ms": args.slo_ttft_ms,
                "tpot_target_ms": args.slo_tpot_ms,
            },
            "kv_store": {"enabled": False},
        }
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("sagellm bench calibrate", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--model", type=Path, help="checkpoint directory; SmolLM2 unless given")
    made.add_argument("--weights", choices=["dtype", "int8", "int8x2"], default="int8x2", help="as engine.weights")
    made.add_argument("--prefill", type=int, default=1)
    made.add_argument("--decode", type=int, default=1)
    made.add_argument("--strategy", default="fifo", choices=["fifo", "priority", "slo_aware", "hybrid"])
    made.add_argument("--rounds", type=int, default=4, help="every second one is checked by, the others learned from")
    made.add_argument("--seconds", type=float, default=30.0, help="of arrivals in a round")
    made.add_argument("--rate-rps", type=float, default=0.0, help=f"0: prefill is busy for {UTILISATION:.0%}")
    made.add_argument("--prompt-tokens", type=float, default=256.0, help="mean")
    made.add_argument("--output-tokens", type=float, default=24.0, help="mean")
    made.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    made.add_argument("--slo-tpot-ms", type=float, default=100.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--profile", type=Path, default=Path("profile.json"), help="written: for `simulate --profile`")
    made.add_argument("--costs", type=Path, help="written: the learned costs, for router.cost_model_path")
    made.add_argument("--steps", type=Path, help="written: all steps that were told")
    made.add_argument("--json", type=Path, help="what was found; a plot (.png) beside it")
    return made


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the option."""
    for name in ("prefill", "decode", "seconds", "prompt_tokens", "output_tokens", "slo_ttft_ms", "slo_tpot_ms"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    if args.rounds < 2:
        raise ConfigError(f"--rounds {args.rounds}: at least one to learn from and one to check by are needed")
    if not args.profile.suffix:
        raise ConfigError(f"--profile {args.profile}: a file name with a suffix, so that it is told from a known one")


def main() -> int:
    args = parser().parse_args()
    try:
        check(args)
        for path in (args.profile, args.costs, args.steps, args.json):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        costs = args.costs or args.profile.with_name(f"{args.profile.stem}_costs.json")
        config = config_of(args, args.model or prepare_smollm2(), costs.resolve())
        with Progress(transient=True) as progress:
            found = uvloop.run(measure(config, args, progress))
    except ConfigError as err:
        print(f"sagellm bench calibrate: {err.message}", file=sys.stderr)
        return 2
    except StartFailed as err:
        print(f"sagellm bench calibrate: {err}: {' '.join(err.tail)}", file=sys.stderr)
        return 1
    except ExceptionGroup as failed:
        requests_failed, rest = failed.split(SageError)
        if rest is not None or requests_failed is None:
            raise
        first = requests_failed.exceptions[0]
        print(f"sagellm bench calibrate: a request failed, so nothing is learned: {first}", file=sys.stderr)
        return 1
    distances, panels = validate(found, args)
    requests = sum(map(len, found["check"]))
    title = (
        f"{args.prefill}P{args.decode}D, {config.model.path.rpartition('/')[2]} ({args.weights}), {args.strategy}, "
        f"{requests} requests at {found['rate_rps']:.2f}/s; target: errors ≤ {TARGET:.0%}"
    )
    print_tables(distances, found["foretold"], found["on_a_core"], title)
    found["profile"].save(args.profile)
    print(f"written: {args.profile} (simulate --profile), {costs} (router.cost_model_path)")
    if args.steps:
        args.steps.write_text(json.dumps(found["steps"]))
    if args.json:
        document = {
            "conditions": {**vars(args), "rate_rps": found["rate_rps"], "requests": requests},
            "distances": [asdict(d) for d in distances],
            "foretold": [asdict(part) for part in found["foretold"]],
            "foretold_on_a_core": [asdict(part) for part in found["on_a_core"]],
            "profile": asdict(found["profile"]),
        }
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")
        lines(panels, title, args.json.with_suffix(".png"), columns=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
