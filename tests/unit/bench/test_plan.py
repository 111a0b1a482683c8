"""The plan is the cheapest shape there is, found with few questions, and the command says what it asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.plan.__main__ import main
from bench.plan.search import Shape, cheapest

PRICES = st.sampled_from([0.5, 1.0, 3.0])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=0, max_size=4),
    PRICES,
    PRICES,
    st.integers(1, 12),
)
def test_no_shape_that_is_enough_is_cheaper(
    minimal: list[tuple[int, int]], prefill_usd: float, decode_usd: float, max_workers: int
) -> None:
    """Enough is whatever has at least as many of both kinds as one of `minimal`."""
    asked: list[Shape] = []

    def enough(shape: Shape) -> bool:
        asked.append(shape)
        return any(shape.decode >= d and (shape.prefill >= p if p else shape.prefill == 0) for p, d in minimal)

    def cost(shape: Shape) -> float:
        return prefill_usd * shape.prefill + decode_usd * shape.decode

    found = cheapest(enough, cost, max_workers)
    grid = [Shape(p, d) for p in range(max_workers) for d in range(1, max_workers + 1 - p)]
    good = [cost(shape) for shape in grid if enough(shape)]
    assert (cost(found) if found else None) == min(good, default=None)
    questions = set(asked[: len(asked) - len(grid)])
    assert len(questions) <= 3 * max_workers + 10


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    workload = ("--format", "poisson", "--requests", "60", "--prompt-tokens", "4000", "--output-tokens", "20")
    monkeypatch.setattr("sys.argv", ["plan", *workload, "--slo-ttft-ms", "1000", *options])
    return main()


def test_more_load_needs_more_workers_and_the_files_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = {}
    for rate in ("2", "40"):
        out = tmp_path / f"{rate}.json"
        options = ("--rate-rps", rate, "--max-workers", "12", "--usd-per-gpu-hour", "2.5", "--json", str(out))
        assert run(monkeypatch, *options) == 0
        found = json.loads(out.read_text())
        chosen = found["chosen"]
        cost[rate] = chosen["usd_per_hour"]
        assert chosen["usd_per_hour"] == 2.5 * (chosen["prefill"] + chosen["decode"])
        assert chosen["slo_attainment"] >= 0.9
        assert chosen["usd_per_million_output_tokens"] > 0
        assert chosen in found["tried"]
        assert out.with_suffix(".png").stat().st_size > 1000
    assert cost["2"] < cost["40"]
    assert "◄" in capsys.readouterr().out


def test_too_few_workers_are_said_to_be_too_few(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--rate-rps", "500", "--max-workers", "2") == 1
    assert "--max-workers" in capsys.readouterr().err
    assert run(monkeypatch, "--rate-rps", "500", "--max-workers", "2", "--slo-ttft-ms", "100") == 1
    assert "% of the prompts take longer than 100 ms on an idle worker" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--usd-per-gpu-hour", "0"], ["--max-workers", "0"], ["--slo-tpot-ms", "-1"]])
def test_wrong_options_are_named(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *options) == 2
    assert options[0] in capsys.readouterr().err
