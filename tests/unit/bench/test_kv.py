"""`sagellm bench kv`: what it writes, and what it says of a trace it cannot read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.benchmarks.kv.__main__ import main, sizes
from bench.benchmarks.kv.replay import belady, ceiling, load_mooncake
from sagellm_common.core.errors import ConfigError

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
    assert {row["policy"] for row in rows} == {"arc", "belady", "cost-aware", "gdsf", "lfu", "lru", "s3-fifo"}
    assert {row["hit_rate"] for row in rows if row["capacity_blocks"] == 6} == {5 / 11}, "all fits, all is hit"
    assert all(row["decision_us"] > 0 for row in rows if row["policy"] != "belady")
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


@pytest.mark.parametrize("text", ["0", "x", "1,%", "-5", "0.01%"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--sizes"):
        sizes(text, 100)
