"""Does it pay, in simulation: the same workers aggregated, deciding per request, and split into prefill and decode."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.sim.cluster import SimCluster, Slo
from bench.sim.profile import PROFILES, Profile
from bench.sim.report import summary
from bench.sim.traces import generated
from sagellm_common.scheduler_ir.pd_separation import Mode
from sagellm_common.scheduler_ir.strategies import make_strategy


@dataclass(frozen=True, slots=True)
class Shape:
    """Without prefill workers, all do both."""

    name: str
    prefill: int
    decode: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    prompt_tokens: int
    output_tokens: int
    rate_rps: float
    link_bytes_per_s: float
    slo: Slo


AGGREGATED = "aggregated"
SHAPES = (
    Shape(AGGREGATED, 0, 4, "never"),
    Shape("4 of both roles, per request", 0, 4, "auto"),
    Shape("2P2D, per request", 2, 2, "auto"),
    Shape("2P2D, always", 2, 2, "always"),
)
LOADS = (
    Load("short prompts, slow link", 256, 256, 8.0, 2e8, Slo(1.0, 0.05)),
    Load("long prompts, fast link", 4096, 256, 2.0, 25e9, Slo(6.0, 0.03)),
    Load("long prompts, fast link, busy", 4096, 256, 3.0, 25e9, Slo(6.0, 0.03)),
)


def measure(requests: int, seed: int, profile: str, progress: Callable[[], None]) -> list[dict[str, object]]:
    """A row per load and shape; `latency_s` is the mean from arrival to the last token."""
    rows: list[dict[str, object]] = []
    for load in LOADS:
        trace = generated(
            requests,
            load.rate_rps,
            seed=seed,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            burstiness=1.0,
            shared_prefixes=0,
        )
        costs: Profile = replace(PROFILES.get(profile), link_bytes_per_s=load.link_bytes_per_s)
        for shape in SHAPES:
            cluster = SimCluster(
                *(costs, shape.prefill, shape.decode),
                lambda learned: make_strategy("fifo", learned),
                load.slo,
                disaggregate=shape.mode,
                both=not shape.prefill,
            )
            outcome = cluster.run(trace)
            result = summary(outcome, load.slo, shape.prefill + shape.decode)
            done = [job for job in outcome.jobs if not job.rejected]
            rows.append(
                {
                    "load": load.name,
                    "shape": shape.name,
                    "latency_s": statistics.mean(job.end_s - job.request.arrival_s for job in done),
                    "disaggregated": sum(bool(job.prefill_worker) for job in done) / len(done),
                    "regret_ms": 1e3 * statistics.mean(job.regret_s for job in done),
                    **{key: result[key] for key in ("slo_attainment", "ttft_ms", "tpot_ms", "rejected")},
                }
            )
            progress()
    return rows
