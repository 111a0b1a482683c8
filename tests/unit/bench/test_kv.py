"""`sagellm bench kv`: what it writes, and what it says of a trace it cannot read."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.benchmarks.kv.__main__ import OURS, REFERENCES, main, sizes
from bench.benchmarks.kv.families import FAMILIES
from bench.benchmarks.kv.oracles import KnowsUses, KnowsWindow
from bench.benchmarks.kv.replay import belady, ceiling, load_mooncake, replay
from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.eviction import EVICTION, make_eviction

TRACE = [[1, 2, 3], [4, 5], [1, 2, 6], [1, 2, 3]]


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_rows_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    trace = written(tmp_path, *(json.dumps({"timestamp": 0, "hash_ids": ids}) for ids in TRACE))
    out = tmp_path / "out" / "kv.json"
    monkeypatch.setattr(sys, "argv", ["kv", "--trace", str(trace), "--sizes", "2,100%", "--json", str(out)])
    assert main() == 0
    rows = json.loads(out.read_text())
    assert {row["policy"] for row in rows} == {*EVICTION, *REFERENCES}
    roomy = [row["hit_rate"] for row in rows if row["capacity_blocks"] == 6]
    assert roomy == pytest.approx([5 / 11] * len(roomy)), "all fits, all is hit"
    assert {row["policy"] for row in rows if not row["decision_us"]} == {*REFERENCES}
    assert "at most 45.5% can hit" in capsys.readouterr().out
    assert out.with_suffix(".md").stat().st_size and out.with_suffix(".png").stat().st_size


def test_references() -> None:
    assert ceiling(TRACE) == pytest.approx(5 / 11)
    assert belady(TRACE, 6) == 5 / 11
    assert belady(TRACE, 2) == 4 / 11


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{"], r"trace.jsonl:1: not a JSON object with hash_ids"),
        (['{"hash_ids": [1]}', '{"hash_ids": "no"}'], r"trace.jsonl:2: hash_ids are 'no'"),
        (['{"hash_ids": [1, 2.5]}'], r"trace.jsonl:1: hash_ids are \[1, 2.5\]; a list of integers is needed"),
        (['{"hash_ids": [true]}'], r"trace.jsonl:1: hash_ids"),
        (["[1]"], r"trace.jsonl:1: not a JSON object"),
        (['{"hash_ids": []}'], "no request in it has a block"),
    ],
)
def test_a_trace_that_is_none(tmp_path: Path, lines: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_mooncake(written(tmp_path, *lines))


def test_a_missing_trace_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["kv", "--trace", str(tmp_path / "none")])
    assert main() == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "x", "1,%", "-5", "0%", "-1%"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--sizes"):
        sizes(text, 100)


def test_a_trace_may_have_more_and_less_than_we_need(tmp_path: Path) -> None:
    odd = ['{"hash_ids": [], "why": "nothing cached"}', "", '{"hash_ids": [7, 7, -1], "tools": {}}']
    assert load_mooncake(written(tmp_path, *odd, *['{"hash_ids": [7]}'] * 2)) == [[], [7, 7, -1], [7], [7]]
    assert sizes("1%,100%", 2) == [1, 2], "at least a block"


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=12).filter(any), st.integers(1, 6))
def test_no_knowledge_beats_all_of_it(trace: list[list[int]], capacity: int) -> None:
    best = belady(trace, capacity)
    for oracle in (KnowsUses(trace), KnowsWindow(trace, 3), KnowsWindow(trace, 1000)):
        assert replay(trace, capacity, oracle, clock=lambda: 0).hit_rate <= best + 1e-9
        assert len(oracle) == len(set(oracle)) <= capacity


def test_knowing_use_counts_spares_what_comes_again() -> None:
    trace = [[1, 2], [3, 4], [5], [1, 2], [6], [1, 2]]
    assert replay(trace, 3, KnowsUses(trace), clock=lambda: 0).hit_rate == belady(trace, 3) == 4 / 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ours_is_good_at_what_it_was_not_made_for(family: str) -> None:
    """Never more than a hundredth behind the least recently used, at any size; mostly it is well ahead."""
    trace = FAMILIES[family](random.Random(7), 300)
    unique = len({block for path in trace for block in path})
    for share in (0.03, 0.1, 0.3):
        capacity = max(1, int(unique * share))
        hits = {n: replay(trace, capacity, make_eviction(n, capacity), clock=lambda: 0).hit_rate for n in (OURS, "lru")}
        assert hits[OURS] >= hits["lru"] - 0.01, (family, share)
