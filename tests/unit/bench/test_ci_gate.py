"""The gate on trees whose speed is known: noise that equal trees see passes, a planted regression does not."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench.ci_gate.__main__ import main
from bench.ci_gate.judge import MIN_ROUNDS, RULES, judge
from bench.paired import median_interval
from bench.presets import METRICS
from bench.presets import Round as Measured
from bench.run import document, markdown

BASE = dict.fromkeys(METRICS, 10.0) | {"kv_hit_rate": 0.25, "comm_share": 0.0}


def drifting(count: int = 15) -> list[float]:
    """A machine whose pace changes fourfold: what it says of two trees one after the other is worth nothing."""
    rng = random.Random(7)
    return [rng.choice((1.0, 1.3, 4.0)) for _ in range(count)]


def rounds(seed: int, factors: Mapping[str, float] | None = None, count: int = 15) -> list[dict[str, float]]:
    """Times grow with the machine's slowness and a little by chance; MFU shrinks with it."""
    rng, found = random.Random(seed), []
    for number, slow in enumerate(drifting(count)):
        row: dict[str, float] = {"number": number}
        for name, value in BASE.items():
            noise = rng.uniform(0.97, 1.03) * slow
            how = 1 / noise if name == "mfu" else 1.0 if name == "kv_hit_rate" else noise
            row[name] = value * how * (factors or {}).get(name, 1.0)
        found.append(row)
    return found


def worse(baseline: Sequence[Mapping[str, float]], current: Sequence[Mapping[str, float]]) -> set[str]:
    return {found.rule.metric for found in judge(baseline, current) if found.verdict == "WORSE"}


def test_all_that_is_measured_is_judged() -> None:
    assert {rule.metric for rule in RULES} == set(METRICS)


@pytest.mark.parametrize("seed", range(1, 20))
def test_equal_trees_pass_on_any_machine(seed: int) -> None:
    assert worse(rounds(seed), rounds(100 + seed)) == set()


@pytest.mark.parametrize(
    ("metric", "factor"),
    [
        *((f"{what}_{which}_ms", 1.1) for what in ("ttft", "tpot") for which in ("p50", "p95")),
        *(("mfu", 0.94), ("kv_hit_rate", 0.9), ("usd_per_million_tokens", 1.1)),
    ],
)
def test_each_regression_is_found_on_any_machine(metric: str, factor: float) -> None:
    assert worse(rounds(1), rounds(2, {metric: factor})) == {metric}
    assert worse(rounds(1), rounds(2, {metric: 1 / factor})) == set(), "it became better"


def test_what_is_within_the_limits_passes_and_transfers_that_appear_do_not() -> None:
    found = rounds(2, {"ttft_p95_ms": 1.04})
    assert worse(rounds(1), found) == set()
    assert worse(rounds(1), [{**row, "comm_share": 0.1} for row in found]) == {"comm_share"}


def test_the_interval_is_that_of_the_sign_test() -> None:
    values = [float(i) for i in range(1, 16)]
    found = median_interval(values, 0.95)  # of 15 coins three or fewer fall on one side 3.5 % of the time, four 12 %
    assert (found.value, found.low, found.high) == (8.0, 4.0, 12.0)
    surely = 1 - 0.05 / len(RULES)
    few = median_interval(values[:MIN_ROUNDS], surely)
    assert (few.low, few.high) == (1.0, float(MIN_ROUNDS))
    assert median_interval(values[: MIN_ROUNDS - 1], surely).high == float("inf")


# ---- the command ----

SCRIPTED = """
import json, os, sys
assert sys.argv[1:5] == ["run", "--preset", "ci", "--turns"], sys.argv
rounds = json.load(open(os.environ.get("ROUNDS", "rounds.json")))
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps(rounds[int(line)]), flush=True)
"""


def scripted(at: Path, found: list[dict[str, float]]) -> Path:
    """A tree whose `bench run --turns` says what it is told to."""
    (at / "bench").mkdir(parents=True)
    (at / "bench" / "__main__.py").write_text(SCRIPTED)
    (at / "rounds.json").write_text(json.dumps(found))
    return at


def gate(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr("sys.argv", ["ci_gate", "--peak-flops", "1", "--rounds", "12", *map(str, options)])
    return main()


def test_two_trees_take_turns_and_a_planted_regression_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, same = scripted(tmp_path / "a", rounds(1)), scripted(tmp_path / "b", rounds(2))
    (slow := tmp_path / "slow.json").write_text(json.dumps(rounds(2, {"tpot_p50_ms": 1.2})))
    out = tmp_path / "out" / "gate.json"
    trees = "--baseline", baseline, "--current", same, "--json", out
    assert gate(monkeypatch, *trees) == 0
    assert {row["verdict"] for row in json.loads(out.read_text())["findings"]} <= {"ok", "undecided"}
    assert gate(monkeypatch, *trees, "--current-env", f"ROUNDS={slow}") == 1
    found = {row["metric"]: row for row in json.loads(out.read_text())["findings"]}
    assert found["tpot_p50_ms"]["verdict"] == "WORSE"
    assert found["tpot_p50_ms"]["low"] > 1.05
    assert "| tpot_p50_ms |" in out.with_suffix(".md").read_text()
    assert "worse than" in capsys.readouterr().err


def test_a_revision_is_checked_out_for_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60).stdout

    scripted(tmp_path, rounds(1))
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "fast")
    (tmp_path / "rounds.json").write_text(json.dumps(rounds(2, {"ttft_p50_ms": 2.0})))
    monkeypatch.chdir(tmp_path)
    assert gate(monkeypatch, "--baseline", "HEAD", "--current", ".") == 1
    assert "ttft_p50_ms" in capsys.readouterr().err
    assert git("worktree", "list").count("\n") == 1


def test_results_are_compared_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for name, factors in (("a", {}), ("b", {"mfu": 0.5})):
        files.append(path := tmp_path / f"{name}.json")
        found = document("ci", [Measured(**row) for row in rounds(3, factors)], 1.0)  # type: ignore[arg-type]
        path.write_text(json.dumps(found))
        assert "| mfu |" in markdown(found)
    assert gate(monkeypatch, "--baseline", files[0], "--current", files[0]) == 0
    assert gate(monkeypatch, "--baseline", files[0], "--current", files[1]) == 1


def test_a_tree_that_cannot_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = scripted(tmp_path / "good", rounds(1)), scripted(tmp_path / "bad", rounds(1, count=3))
    assert gate(monkeypatch, "--baseline", good, "--current", bad) == 3
    assert "current: `bench run --turns` ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--baseline", "no-such-revision"], "no-such-revision"),
        (["--baseline", ".", "--rounds", "3"], "--rounds"),
        (["--baseline", "results.json", "--current", "."], "two results or two trees"),
        (["--baseline", "results.json", "--current", "results.json"], "results.json"),
        (["--baseline", ".", "--current-env", "x"], "NAME=VALUE"),
    ],
)
def test_wrong_options_are_named(
    options: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.json").write_text('{"rounds": []}')
    assert gate(monkeypatch, *options) == 2
    assert named in capsys.readouterr().err
