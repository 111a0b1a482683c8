"""The GPU check, dry: real engines, stock and patched, in processes of their own, on the CPU with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_dry_run_does_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--out", str(tmp_path / "found.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["failed"] == []
    assert document["conditions"]["dry_run"]
    found = document["shapes"]["tiny"]
    greedy = found["greedy_against_transformers"]
    assert greedy["tokens"] == greedy["best_in_float32"] == 18
    assert found["disaggregated_equals_single"]["differs"] == []
    assert found["patched_equals_stock"]["differs"] == []
    engines = found["engines"]
    assert "all" in engines["patched"]["engine"]
    assert "without" in engines["stock"]["engine"]
    assert {engine["kv_memory"] for engine in engines.values()} == {"TensorKvMemory"}
    blocks = -(-found["transfer"]["prompt_tokens"] // 16)
    assert found["transfer"]["bytes"] == blocks * engines["patched"]["block_bytes"]
    metrics = {"prefill_tokens_per_s", "tpot_ms_batch_1", "tpot_ms_batch_2", "tpot_ms_batch_4"}
    assert set(found["speed"]) == metrics
    assert all(value["stock"] > 0 and value["patched"] > 0 for value in found["speed"].values())
    tables = [line for line in done.stdout.splitlines() if line.startswith("tiny ") and "  " in line]
    assert len(tables) == 3 + len(metrics) + 3
