"""Calibration on measurements whose truth is known, because the test makes them."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.benchmarks.calibrate.__main__ import check, main, parser, validate
from bench.benchmarks.calibrate.compare import distance
from bench.benchmarks.calibrate.fit import foretold, learned, links_foretold, on_a_core, profile_of
from bench.benchmarks.calibrate.measure import Served
from bench.sim.__main__ import strategy_maker
from bench.sim.cluster import SimCluster, Slo
from bench.sim.profile import Profile
from bench.sim.traces import SimRequest, generated
from bench.sim.workers import step_seconds
from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, NoWorker
from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.types import GenerationSummary, KvLayout, ModelInfo

TRUE = Profile(
    prefill=(5e-3, 8e-4, 2e-7),
    decode=(4e-3, 4e-6, 2e-4),
    larger_batches=((5, (2e-3, 4e-6, 6e-4)),),
    link_latency_s=0.01,
    link_bytes_per_s=1e9,
    kv_bytes_per_token=1000,
    num_layers=10,
    kv_tokens=1000 * 16,
    max_batch=16,
    prefill_chunk_tokens=512,
    overhead_s=0.004,
)
MODEL = ModelInfo("m", "/m", 8192, 1000, KvLayout("m", "float32", 16, 10, 1, 8, 16_000))


def steps(count: int, seed: int, noise: float) -> list[StepCost]:
    rng, found = random.Random(seed), list[StepCost]()
    for _ in range(count):
        end = rng.randrange(16, 512)
        a, b, c = TRUE.prefill
        took_s = (a + b * end + c * end * end) * math.exp(rng.gauss(0, noise))
        found.append(StepCost.prefill([(0, end)], took_s, took_s))
        batch, context = rng.randrange(1, 9), rng.randrange(100, 4000)
        a, b, c = TRUE.decode_costs(batch)
        took_s = (a + b * context + c * batch) * math.exp(rng.gauss(0, noise))
        found.append(StepCost(took_s, sequences=batch, context_tokens=context, cpu_seconds=took_s))
    return found


def served(requests: list[SimRequest], profile: Profile = TRUE) -> list[Served]:
    """As a cluster with just these costs would."""
    jobs = SimCluster(profile, 1, 1, strategy_maker("fifo"), Slo(2, 0.1), block_tokens=16).run(requests).jobs
    found = []
    for job in jobs:
        ttft_s, step_s, tokens = job.first_token_s - job.request.arrival_s, 5e-3, job.request.prompt_tokens
        join_s = profile.prefill[0] + profile.prefill[1] + profile.prefill[2] * (2 * tokens + 1)
        moved = job.request.prompt_tokens * profile.kv_bytes_per_token
        summary = GenerationSummary(
            kv_bytes_transferred=moved,
            transfer_ms=1e3 * (0.001 + moved / profile.link_bytes_per_s),
            prefill_engine_ms=1e3 * (ttft_s - profile.overhead_s),
        )
        found.append(Served(job.request, ttft_s, job.tpot_s, join_s + profile.link_latency_s, step_s, summary))
    return found


def prefill_s(profile: Profile, tokens: int) -> float:
    a, b, c = profile.prefill
    return a + b * tokens + c * tokens * tokens


def calibrated(noise: float = 0.0) -> tuple[Profile, dict[str, object]]:
    told = steps(300, 1, noise)
    alone = served([SimRequest(10.0 * i, 100 * i, 8) for i in range(1, 6)])
    costs = learned(told, alone)
    profile = profile_of(costs, told, alone, alone, Config(), MODEL, 1000)
    return profile, {"costs": costs, "profile": profile}


def test_the_profile_is_that_of_the_cluster() -> None:
    profile, _ = calibrated()
    assert profile.prefill == pytest.approx(TRUE.prefill, rel=0.01)
    for batch in (1, 3, 8):
        assert step_seconds(profile, batch, 2000) == pytest.approx(step_seconds(TRUE, batch, 2000), rel=0.01)
    assert profile.prefill_noise == pytest.approx([1.0] * 64, rel=1e-3)
    for name in ("overhead_s", "link_latency_s", "link_bytes_per_s", "kv_bytes_per_token", "kv_tokens", "num_layers"):
        assert getattr(profile, name) == pytest.approx(getattr(TRUE, name), rel=0.01), name


def test_noisy_steps_take_their_mean_in_the_end() -> None:
    """Outliers count for less in the costs; what is drawn, and decode's mean, make up for it."""
    profile, _ = calibrated(noise=0.4)
    mean = math.exp(0.4**2 / 2)
    drawn = sum(profile.prefill_noise) / len(profile.prefill_noise)
    assert drawn * prefill_s(profile, 256) == pytest.approx(mean * prefill_s(TRUE, 256), rel=0.1)
    assert step_seconds(profile, 3, 2000) == pytest.approx(mean * step_seconds(TRUE, 3, 2000), rel=0.1)


def test_what_was_measured_is_simulated_again_and_another_cluster_is_told_apart() -> None:
    _, found = calibrated()
    requests = generated(60, 3.0, seed=4, prompt_tokens=200, output_tokens=20)
    requests = [
        replace(r, prompt_tokens=min(r.prompt_tokens, 1000), output_tokens=r.output_tokens + 2) for r in requests
    ]
    args = parser().parse_args([])
    distances, panels = validate({**found, "check": [served(requests)]}, args)
    assert [d.metric for d in distances] == ["TTFT", "TPOT"]
    assert max(d.worst for d in distances) < 0.03, distances
    assert {frozenset(sides) for sides in panels.values()} == {frozenset({"measured", "simulated"})}
    slow = replace(TRUE, prefill=(5e-3, 1.2e-3, 2e-7))
    distances, _ = validate({**found, "check": [served(requests, slow)]}, args)
    assert distances[0].worst > 0.15


def test_distances_are_shares_of_what_was_measured() -> None:
    measured = [float(i) for i in range(1, 101)]
    found = distance("TTFT", measured, [1.2 * value for value in measured])
    assert found.p50_error == found.p95_error == pytest.approx(0.2)
    assert found.distribution_error == pytest.approx(0.2, rel=0.02)
    with pytest.raises(ValueError, match="TTFT: 0 measured"):
        distance("TTFT", [], [1.0])


def test_errors_are_told_by_kind_and_size_and_of_the_time_on_a_core() -> None:
    costs = learned(steps(200, 2, 0.0), ())
    quiet = steps(50, 3, 0.0)
    disturbed = [replace(step, seconds=2 * step.seconds) for step in steps(50, 4, 0.0)]
    parts = {part.part: part for part in foretold(costs, quiet + disturbed)}
    assert parts["prefill"].steps == parts["decode"].steps == 100
    assert parts["prefill"].mape == pytest.approx(0.25, abs=0.02)
    assert sum(p.steps for name, p in parts.items() if name.startswith("prefill ≤")) == 100
    pulled = learned((), served([SimRequest(10.0 * i, 50 * i, 8) for i in range(1, 16)]))
    (transfer,) = links_foretold(pulled, served([SimRequest(0.0, 333, 8)]))
    assert (transfer.part, transfer.steps) == ("transfer", 1)
    assert transfer.mape < 0.01
    assert links_foretold(pulled, ()) == []
    assert {part.part: part.mape for part in foretold(costs, on_a_core(quiet + disturbed))}["decode"] < 0.02


@pytest.mark.parametrize(
    "options", [["--rounds", "1"], ["--prefill", "0"], ["--profile", "known"], ["--prompt-tokens", "nan"]]
)
def test_wrong_options_are_named(options: list[str]) -> None:
    args: argparse.Namespace = parser().parse_args(options)
    with pytest.raises(ConfigError, match=options[0]):
        check(args)


def test_a_request_that_fails_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def failing(*_: object) -> None:
        raise ExceptionGroup("requests", [NoWorker("nobody serves")])

    monkeypatch.setattr("bench.benchmarks.calibrate.__main__.measure", failing)
    monkeypatch.setattr("sys.argv", ["calibrate", "--model", "/m", "--profile", str(tmp_path / "p.json")])
    assert main() == 1
    assert "nobody serves" in capsys.readouterr().err
