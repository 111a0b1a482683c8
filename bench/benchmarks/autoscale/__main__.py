"""`sagellm bench autoscale`: the autoscaler's planner on a trace in simulation, beside an oracle, a HPA, fixed sizes.

    sagellm bench autoscale [--trace FILE --format …] [--waves 1800 --spikes 6] [--json OUT]

All scale the same simulated cluster, with the same production router. The oracle knows each interval's requests before
they come and plans them with our own arithmetic: what it is ahead of ours by is what the forecast did not know.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench.benchmarks.autoscale.policies import by_utilisation, fixed, oracle, ours
from bench.plots import plt
from bench.sim.__main__ import add_workload, check_targets, slo_of, strategy_maker, workload
from bench.sim.cluster import Slo
from bench.sim.profile import Profile, load_profile
from bench.sim.report import attainment
from bench.sim.scaling import Decide, ScaledCluster
from bench.sim.traces import MOONCAKE_BLOCK_TOKENS, SimRequest
from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.autoscaler.capacity import Targets, WorkerLimits

TARGET_ATTAINMENT = 0.99
TARGET_GPU_HOURS = 1.15
"""Of the oracle's."""


def waved(requests: Sequence[SimRequest], period_s: float, spikes: int, seed: int) -> list[SimRequest]:
    """The same requests in the same order over the same time; their rate goes up and down by 0.8 of its mean once in
    `period_s`, and `spikes` times it is three times as high for two minutes."""
    rng, span_s = random.Random(seed), requests[-1].arrival_s
    starts = [rng.uniform(0, span_s) for _ in range(spikes)]

    def rate(at_s: float) -> float:
        wave = 1 + 0.8 * math.sin(2 * math.pi * at_s / period_s) if period_s else 1.0
        return wave * (3.0 if any(start <= at_s < start + 120 for start in starts) else 1.0)

    steps = 20_000
    grown = [0.0]
    for i in range(steps):
        grown.append(grown[-1] + rate((i + 0.5) * span_s / steps))
    found, at = [], 0
    for request in requests:
        wanted = request.arrival_s / span_s * grown[-1]
        while at < steps - 1 and grown[at + 1] < wanted:
            at += 1
        share = (wanted - grown[at]) / (grown[at + 1] - grown[at])
        found.append(replace(request, arrival_s=(at + share) * span_s / steps))
    return found


def simulate(
    args: argparse.Namespace,
    profile: Profile,
    slo: Slo,
    requests: Sequence[SimRequest],
    decide: Callable[[Callable[[], CostModel]], Decide],
    config: AutoscalerConfig,
    start: tuple[int, int],
) -> dict[str, Any]:
    costs: list[CostModel] = []
    cluster = ScaledCluster(
        profile,
        *start,
        strategy_maker(args.strategy),
        slo,
        block_tokens=MOONCAKE_BLOCK_TOKENS,
        eviction=args.eviction,
        seed=args.seed,
        decide=decide(lambda: costs[0]),
        interval_s=config.interval_s,
        startup_s=config.startup_s,
        until_s=requests[-1].arrival_s,
    )
    costs.append(cluster.costs)
    outcome = cluster.run(requests)
    cluster.settle(requests[-1].arrival_s)
    return {
        "slo_attainment": attainment(outcome, slo),
        "gpu_hours": cluster.gpu_seconds / 3600,
        "history": cluster.history,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("sagellm bench autoscale", description=(__doc__ or "").partition(": ")[2])
    add_workload(made)
    made.set_defaults(format="poisson", requests=72_000, rate_rps=20.0, prompt_tokens=4096.0, output_tokens=512.0)
    made.add_argument("--waves", type=float, default=1800.0, metavar="SECONDS", help="period of the rate; 0: as it is")
    made.add_argument("--spikes", type=int, default=6, help="times that the rate triples for two minutes")
    made.add_argument("--interval-s", type=float, default=15.0)
    made.add_argument("--startup-s", type=float, default=60.0)
    made.add_argument("--max-workers", type=int, default=32, help="of each phase")
    made.add_argument("--json", type=Path, help="and a .png beside it")
    return made


def main() -> int:
    args = parser().parse_args()
    check_targets(args)
    profile, slo = load_profile(args.profile), slo_of(args)
    requests = waved(workload(args), args.waves, args.spikes, args.seed)
    most = args.max_workers
    config = AutoscalerConfig(interval_s=args.interval_s, startup_s=args.startup_s, max_prefill=most, max_decode=most)
    targets, limits = Targets(slo.ttft_s, slo.tpot_s), WorkerLimits(profile.max_batch, profile.kv_tokens)
    makers: dict[str, Callable[[Callable[[], CostModel]], Decide]] = {
        "oracle": lambda costs: oracle(config, costs, targets, limits, requests),
        "ours": lambda costs: ours(config, costs, targets, limits),
        "utilisation": lambda costs: by_utilisation(config),
    }
    results: dict[str, dict[str, Any]] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(makers) + 2)

        def run(name: str, maker: Callable[[Callable[[], CostModel]], Decide], start: tuple[int, int]) -> None:
            progress.update(task, description=name)
            results[name] = simulate(args, profile, slo, requests, maker, config, start)
            progress.advance(task)

        for name, maker in makers.items():
            run(name, maker, (2, 2))
        history = results["oracle"]["history"]
        peak = max(h[1] for h in history), max(h[2] for h in history)
        mean = tuple(max(1, round(sum(h[i] for h in history) / len(history))) for i in (1, 2))
        run(f"fixed, peak {peak[0]}P{peak[1]}D", lambda _: fixed(*peak), peak)
        run(f"fixed, mean {mean[0]}P{mean[1]}D", lambda _: fixed(mean[0], mean[1]), (mean[0], mean[1]))
    best = results["oracle"]
    print(f"{len(requests):,} requests, {args.profile}, TTFT {args.slo_ttft_ms:g} ms, TPOT {args.slo_tpot_ms:g} ms\n")
    print(f"{'':28}{'in time':>9}{'of oracle':>11}{'GPU-hours':>11}{'of oracle':>11}")
    for name, result in results.items():
        shares = result["slo_attainment"] / best["slo_attainment"], result["gpu_hours"] / best["gpu_hours"]
        result["attainment_of_oracle"], result["gpu_hours_of_oracle"] = shares
        print(
            f"{name:28}{result['slo_attainment']:>9.1%}{shares[0]:>11.3f}{result['gpu_hours']:>11.2f}{shares[1]:>11.3f}"
        )
    own = results["ours"]
    met = own["attainment_of_oracle"] >= TARGET_ATTAINMENT and own["gpu_hours_of_oracle"] <= TARGET_GPU_HOURS
    print(
        f"\ntarget of ours: at least {TARGET_ATTAINMENT} and at most {TARGET_GPU_HOURS}: {'met' if met else 'MISSED'}"
    )
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, **results}, indent=1))
        draw(requests, results, config.interval_s, args.json.with_suffix(".png"))
        print(f"written to {args.json} and {args.json.with_suffix('.png')}")
    return 0


def draw(requests: Sequence[SimRequest], results: dict[str, dict[str, Any]], bin_s: float, picture: Path) -> None:
    figure, (load, prefill, decode) = plt.subplots(3, 1, figsize=(10, 8), sharex=True)
    counts: dict[int, int] = {}
    for request in requests:
        counts[int(request.arrival_s / bin_s)] = counts.get(int(request.arrival_s / bin_s), 0) + 1
    load.plot([b * bin_s / 60 for b in counts], [n / bin_s for n in counts.values()], color="gray", linewidth=0.8)
    load.set_ylabel("requests per second")
    for name, result in results.items():
        minutes = [at / 60 for at, _, _ in result["history"]]
        prefill.step(minutes, [p for _, p, _ in result["history"]], label=name, where="post")
        decode.step(minutes, [d for _, _, d in result["history"]], label=name, where="post")
    prefill.set_ylabel("prefill workers")
    decode.set_ylabel("decode workers")
    decode.set_xlabel("minutes")
    prefill.legend(fontsize=8)
    figure.suptitle("Workers asked for, simulated")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
