"""`sagellm bench strategies --trace FILE`: goodput of our strategies and of other routers' rules, simulated."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.progress import Progress

from bench.plots import grouped_bars, lines
from bench.sim.__main__ import strategy_maker
from bench.sim.cluster import Outcome, SimCluster, Slo
from bench.sim.peers import PEERS
from bench.sim.profile import PROFILES
from bench.sim.report import ATTAINMENT, attainment, goodput, meets, summary
from bench.sim.traces import FORMATS, SimRequest, load_trace, scaled
from sagellm_common.core.errors import ConfigError
from sagellm_common.scheduler_ir.strategies import STRATEGIES

TENANTS = 8
SHAPES = "1P1D,2P2D,4P4D,6P2D"
CURVE = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3)
"""Rates at which attainment is drawn, as shares of the best strategy's goodput."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy on one shape; what a worker process is given."""

    trace: Path
    form: str
    shape: str
    strategy: str
    profile: str
    slo: Slo

    @property
    def workers(self) -> tuple[int, int]:
        prefill, _, decode = self.shape.removesuffix("D").partition("P")
        return int(prefill), int(decode)

    def requests(self) -> list[SimRequest]:
        """The trace's, dealt to tenants: the traces do not say whose they are."""
        rng = random.Random(0)
        names, sizes = zip(*((f"tenant-{n}", 1 / n) for n in range(1, TENANTS + 1)), strict=True)
        return [
            replace(one, tenant=one.tenant or rng.choices(names, sizes)[0]) for one in load_trace(self.trace, self.form)
        ]

    def run(self, requests: Sequence[SimRequest], max_misses: float = math.inf) -> Outcome:
        prefill, decode = self.workers
        make = strategy_maker(self.strategy)
        profile = PROFILES.get(self.profile)
        return SimCluster(profile, prefill, decode, make, self.slo, max_misses=max_misses).run(requests)


def find_goodput(cell: Cell) -> float:
    requests = cell.requests()
    found = goodput(requests, lambda scaled: cell.run(scaled, (1 - ATTAINMENT) * len(requests)), cell.slo)
    assert found is not None, "checked before: they come at different times"
    return found


def fairness(outcome: Outcome, slo: Slo) -> float:
    """Jain's index of the tenants' shares in time: 1 where all are served alike, 1/TENANTS where one has it all."""
    jobs = sorted(outcome.jobs, key=lambda job: job.request.tenant)
    shares = [
        sum(map(partial(meets, slo=slo), of_tenant)) / len(of_tenant)
        for of_tenant in (list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.request.tenant))
    ]
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def at_rates(cell: Cell, rates_rps: Sequence[float]) -> tuple[dict[float, float], dict[str, object]]:
    """Attainment by rate, and the summary at the last but two: the best strategy's own goodput."""
    requests = cell.requests()
    base_rps = len(requests) / max(requests[-1].arrival_s, 1e-9)
    outcomes = {rate: cell.run(scaled(requests, rate / base_rps)) for rate in rates_rps}
    full = rates_rps[CURVE.index(1.0)]
    return (
        {rate: attainment(outcome, cell.slo) for rate, outcome in outcomes.items()},
        summary(outcomes[full], cell.slo, sum(cell.workers)) | {"fairness": fairness(outcomes[full], cell.slo)},
    )


def markdown(rows: Sequence[dict[str, object]], shapes: Sequence[str], title: str) -> str:
    """A table of goodput by shape, and one of what happened at the best strategy's rate."""
    found = {(str(row["strategy"]), str(row["shape"])): row for row in rows}
    names = list(dict.fromkeys(str(row["strategy"]) for row in rows))
    peer = {s: max((_float(found[n, s]["goodput_rps"]) for n in names if n in PEERS), default=0.0) for s in shapes}
    table = [["strategy", *shapes]]
    for name in names:
        cells = [_float(found[name, shape]["goodput_rps"]) for shape in shapes]
        beside = (f" ({c / peer[s]:.2f}×)" if peer[s] else "" for c, s in zip(cells, shapes, strict=True))
        table.append([name, *(f"{c:.2f}{text}" for c, text in zip(cells, beside, strict=True))])
    detail = [["shape", "strategy", "in time", "TTFT p50/p95 ms", "TPOT p50/p95 ms", "KV hit", "fairness"]]
    for shape in shapes:
        for name in names:
            at = found[name, shape]["at_best_rate"]
            assert isinstance(at, dict)
            ttft, tpot = at["ttft_ms"], at["tpot_ms"]
            detail.append(
                [
                    *(shape, name, f"{at['slo_attainment']:.1%}", f"{ttft['p50']:,.0f} / {ttft['p95']:,.0f}"),
                    *(f"{tpot['p50']:.1f} / {tpot['p95']:.1f}", f"{at['kv_hit_rate']:.1%}", f"{at['fairness']:.3f}"),
                ]
            )
    return "\n".join(
        [
            title,
            "",
            f"Goodput in requests per second: the highest rate at which {ATTAINMENT:.0%} of all offered meet both "
            "targets (in brackets: of the best peer's rule).",
            "",
            *_aligned(table),
            "",
            "At the rate of the best strategy's goodput; fairness is Jain's index of the shares in time of "
            f"{TENANTS} tenants, the k-th with a k-th of the first one's requests:",
            "",
            *_aligned(detail),
        ]
    )


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    out = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
    out.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return out


def _float(value: object) -> float:
    assert isinstance(value, float | int)
    return float(value)


def main() -> int:
    parser = argparse.ArgumentParser("sagellm bench strategies", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--format", choices=[*FORMATS], default="mooncake")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--profile", default="h200x4-70b", help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--slo-ttft-ms", type=float, default=5000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=50.0)
    parser.add_argument("--strategies", default=",".join([*STRATEGIES, *PEERS]))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="rows go here; the tables (.md) and plots (.png) beside it")
    args = parser.parse_args()
    shapes, names = args.shapes.split(","), args.strategies.split(",")
    slo = Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)
    cells = [Cell(args.trace, args.format, shape, name, args.profile, slo) for shape in shapes for name in names]
    try:
        if not load_trace(args.trace, args.format)[-1].arrival_s:
            raise ConfigError(f"--trace {args.trace}: all requests come at once, there is no rate to search")
        PROFILES.get(args.profile)
        for cell in cells:
            strategy_maker(cell.strategy)
            if not all(part.isdigit() for part in cell.shape.removesuffix("D").split("P", 1)):
                raise ConfigError(f"--shapes {cell.shape!r}: write them as 2P4D")
    except ConfigError as err:
        print(f"sagellm bench strategies: {err.message}", file=sys.stderr)
        return 2
    rows: list[dict[str, object]] = []
    curves: dict[str, dict[str, dict[float, float]]] = {shape: {} for shape in shapes}
    with Progress(transient=True) as progress, ProcessPoolExecutor(args.jobs) as pool:
        task = progress.add_task("goodput", total=len(cells))
        searching = {pool.submit(find_goodput, cell): cell for cell in cells}
        rates: dict[Cell, float] = {}
        for search in as_completed(searching):
            rates[searching[search]] = search.result()
            progress.advance(task)
        best = {shape: max(rate for cell, rate in rates.items() if cell.shape == shape) for shape in shapes}
        task = progress.add_task("at the best rate", total=len(cells))
        drawing = {
            pool.submit(at_rates, cell, [share * max(best[cell.shape], 1e-6) for share in CURVE]): cell
            for cell in cells
        }
        drawn = {}
        for draw in as_completed(drawing):
            drawn[drawing[draw]] = draw.result()
            progress.advance(task)
    for cell in cells:
        curve, at_best = drawn[cell]
        curves[cell.shape][cell.strategy] = dict(curve)
        rows.append(
            {"shape": cell.shape, "strategy": cell.strategy, "goodput_rps": rates[cell], "at_best_rate": at_best}
            | {"attainment": curve}
        )
    title = (
        f"{args.trace.name}, {args.profile}, simulated; targets: TTFT {args.slo_ttft_ms:g} ms, TPOT "
        f"{args.slo_tpot_ms:g} ms"
    )
    text = markdown(rows, shapes, title)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text + "\n")
        bars = {name: {cell.shape: rates[cell] for cell in cells if cell.strategy == name} for name in names}
        grouped_bars({"goodput, requests/s": bars}, title, args.json.with_suffix(".png"))
        panels = {f"{shape}: share in time by requests/s": curves[shape] for shape in shapes}
        lines(panels, title, args.json.with_name(args.json.stem + "_curves.png"), columns=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
