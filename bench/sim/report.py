"""What a simulated run came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bench.sim.cluster import Outcome, Slo
from bench.sim.traces import SimRequest, scaled
from bench.sim.workers import Job

ATTAINMENT = 0.9
"""Goodput is the highest rate at which this share of all offered requests meets both targets."""
SEARCH_STEPS = 6
"""Of a range from a rate to its double: within 1.1 %."""

Run = Callable[[Sequence[SimRequest]], Outcome]


def meets(job: Job, slo: Slo) -> bool:
    ttft_s = job.first_token_s - job.request.arrival_s
    return not math.isnan(job.end_s) and ttft_s <= slo.ttft_s and job.tpot_s <= slo.tpot_s


def attainment(outcome: Outcome, slo: Slo) -> float:
    """Share of *all offered* requests that met both targets: a rejected one is a miss."""
    return sum(meets(job, slo) for job in outcome.jobs) / len(outcome.jobs)


def summary(outcome: Outcome, slo: Slo, num_workers: int) -> dict[str, object]:
    done = [job for job in outcome.jobs if not math.isnan(job.end_s)]
    prompt = sum(job.request.prompt_tokens for job in done)
    hit = sum(job.prefill_hit_tokens for job in done)
    return {
        "offered": len(outcome.jobs),
        "completed": len(done),
        "rejected": len(outcome.jobs) - len(done),
        "slo_attainment": attainment(outcome, slo),
        "ttft_ms": _percentiles([1e3 * (job.first_token_s - job.request.arrival_s) for job in done]),
        "tpot_ms": _percentiles([1e3 * job.tpot_s for job in done if job.request.output_tokens > 1]),
        "kv_hit_rate": hit / prompt if prompt else 0.0,
        "kv_transferred_bytes": outcome.transferred_bytes,
        "gpu_seconds": num_workers * outcome.end_s,
        "gpu_busy_share": outcome.busy_s / (num_workers * outcome.end_s) if outcome.end_s else 0.0,
        "duration_s": outcome.end_s,
        "output_tokens": sum(job.request.output_tokens for job in done),
    }


def goodput(requests: Sequence[SimRequest], run: Run, slo: Slo, own: float | None = None) -> float | None:
    """Requests per second, by bisection of the trace's rate; 0 where not even a 64th of it is served in time. None
    where all come at once: they have no rate. `own` is the attainment at the trace's own, where that is known."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    if span_s <= 0:
        return None
    base_rps = len(requests) / span_s

    def served(scale: float) -> bool:
        return attainment(run(scaled(requests, scale)), slo) >= ATTAINMENT

    low, high = 0.0, 1.0
    if served(1.0) if own is None else own >= ATTAINMENT:
        low = 1.0
        while low < 64 and served(high := 2 * low):
            low = high
        if low >= 64:
            return low * base_rps
    else:
        while high > 1 / 64 and not served(high / 2):
            high /= 2
        low = high / 2
        if high <= 1 / 64:
            return 0.0
    for _ in range(SEARCH_STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if served(middle) else (low, middle)
    return low * base_rps


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p95": None, "p99": None}
    return {name: float(np.percentile(values, p)) for name, p in (("p50", 50), ("p95", 95), ("p99", 99))}
