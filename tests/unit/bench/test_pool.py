"""`python -m bench.pool`: what it counts, on a trace small enough to know."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bench.pool import BLOCK_TOKENS, SAMPLE, Batching, Request, load, main, make_sample, segments


def test_segments_are_runs_of_neighbours() -> None:
    assert segments(np.arange(64)) == 1
    assert segments(np.array([3, 4, 9, 8])) == 3 * 16


def test_the_shipped_sample_is_the_one_that_is_made() -> None:
    assert load(SAMPLE) == list(make_sample())


def test_all_requests_end_and_shared_documents_hit() -> None:
    requests = [Request(n % 2, 40, 50 + n, 20) for n in range(12)]
    found = Batching(requests, num_blocks=24, reserve=False, defrag=True).run()
    assert found.requests == 12
    assert 0.5 < found.utilization <= found.held
    assert 0 < found.internal_fragmentation < 0.5
    assert found.hit_rate > 0.2


def test_what_is_reserved_is_held_and_empty() -> None:
    requests = [Request(n, 0, BLOCK_TOKENS, 4) for n in range(3)]
    found = Batching(requests, num_blocks=256, reserve=True, defrag=False).run()
    assert found.held == 1.0
    assert found.utilization < 0.1
    assert found.internal_fragmentation > 0.9


def test_numbers_and_targets_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out" / "pool.json"
    trace.write_text("".join(json.dumps(asdict(Request(n, 0, 20, 30))) + "\n" for n in range(120)))
    monkeypatch.setattr(sys, "argv", ["pool", "--trace", str(trace), "--blocks", "300", "--json", str(out)])
    main()
    written = json.loads(out.read_text())
    assert written["conditions"] == {"trace": "trace.jsonl", "requests": 120, "blocks": 300}
    assert set(written["results"]) == {"paged", "paged, gaps closed", "longest reserved"}
    assert len(written["targets"]) == 2
