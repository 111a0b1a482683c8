"""engine.device `cuda` without a GPU: everything of LMDeploy's CUDA path but the device runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check.reference import verdict

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install triton==3.6.0 (no GPU needed)",
)


@pytest.fixture(scope="module")
def found(tiny_llama: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_cuda", str(tiny_llama)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.timeout(300)
def test_greedy_equals_transformers(found: dict[str, Any], tiny_llama: Path) -> None:
    plain = found["0"]
    sequences = list(zip(plain["prompts"], plain["alone"], strict=True))
    judged = verdict(str(tiny_llama), "cpu", "float16", sequences)
    assert judged["ok"], judged
    assert (plain["memory"], plain["layout_dtype"], plain["cpu_plug_in"]) == ("TensorKvMemory", "float16", False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bits", ["0", "8"])
def test_kv_moved_to_other_blocks_continues_as_if_undisturbed(found: dict[str, Any], bits: str) -> None:
    answers = found[bits]
    assert answers["handed_over"] == answers["alone"] == answers["batched"]
    assert all(len(tokens) == 3 for tokens in answers["alone"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bits", ["0", "8"])
def test_kv_may_be_pulled_chunk_by_chunk_while_the_prompt_is_computed(found: dict[str, Any], bits: str) -> None:
    assert found[bits]["followed"] == [[0, 16, 0], [16, 0, 0], [16, 18, 0], [18, 0, 0]]
