"""`sagellm bench plan`: CPU time of building and optimising execution plans, pass by pass."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.facts import Facts, TransferHow, WorkerFacts
from sagellm_common.scheduler_ir.ir_graph import IRRequest
from sagellm_common.scheduler_ir.optimizer import REWRITES
from sagellm_common.scheduler_ir.passes.legality import check_legal
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from sagellm_common.scheduler_ir.strategies import Placement, RequestView

TARGETS_MS = {1: 0.5, 100: 5.0}


def facts() -> Facts:
    """Two workers with learned costs, so that no pass gets away with knowing nothing."""
    costs = CostModel()
    for n in range(1, 40):
        costs.observe_prefill([(0, 100 * n)], 1e-2 * n)
        costs.observe_decode(n, 1000 * (n % 7), 0.01 + 1e-3 * n)
        costs.observe_transfer("prefill-0", "decode-0", n << 20, 1e-3 * n)
    return Facts(
        {"prefill-0": WorkerFacts(16, 1 << 17), "decode-0": WorkerFacts(16, 1 << 17, sequences=4, context_tokens=4000)},
        costs,
        lambda source, target, computed, moved: TransferHow(True, 1 << 20, "same"),
        kv_bytes_per_token=1024,
        num_layers=32,
        tpot_target_s=0.05,
    )


def requests(count: int) -> list[IRRequest]:
    """Each with something in every cache: all node kinds that the router plans."""
    placement = Placement("decode-0", "prefill-0", "kv-store-0", "bench", "as placed")
    cached = {"prefill-0": 256, "decode-0": 128}
    return [IRRequest(RequestView(f"r{n}", 2000 + n), placement, 128, cached, 512) for n in range(count)]


def measure(count: int, rounds: int) -> dict[str, float]:
    """Median ms of CPU time of each step for so many requests at once, and of all of them."""
    known, wanted = facts(), requests(count)
    builder, passes = IRBuilder(known.workers), (PDSeparator().split, *REWRITES, check_legal)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        began = last = time.thread_time()

        def lap(name: str, since: float) -> float:
            now = time.thread_time()
            times.setdefault(name, []).append(1e3 * (now - since))
            return now

        graph = builder.build(wanted)
        last = lap("build", last)
        for one in passes:
            graph = one(graph, known)
            last = lap(one.__name__, last)
        graph.plans()
        lap("plans", last)
        lap("all", began)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("sagellm bench plan", description=__doc__.partition(": ")[2])
    parser.add_argument("--rounds", type=int, default=200, help="medians of so many")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    found = {count: measure(count, args.rounds) for count in TARGETS_MS}
    print(f"| CPU ms for | {' | '.join(found[1])} | target |\n|{'---|' * (len(found[1]) + 2)}")
    for count, row in found.items():
        cells = " | ".join(f"{ms:.3f}" for ms in row.values())
        print(f"| {count} request{'s' * (count > 1)} | {cells} | {TARGETS_MS[count]:g} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"targets_ms": TARGETS_MS, "ms": found}, indent=1) + "\n")
    return 0 if all(row["all"] < TARGETS_MS[count] for count, row in found.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
