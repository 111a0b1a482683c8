"""The GPU check's arithmetic and judgement. That all of it runs: tests/integration/test_gpu_check.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check.measure import DRY_RUN, FULL, _against, _compared, utilisation
from bench.gpu_check.reference import verdict
from bench.gpu_check.shapes import SHAPES, Shape
from sagellm_common.comm_backend.hardware import select_device
from tests.support.oracle import greedy


def test_shapes_are_those_of_llama_3() -> None:
    """Their published sizes: 1.24 and 8.03 billion, norms included."""
    norms = {name: (2 * shape.num_layers + 1) * shape.hidden_size for name, shape in SHAPES.items()}
    assert SHAPES["1B"].parameters + norms["1B"] == 1_235_814_400
    assert SHAPES["8B"].parameters + norms["8B"] == 8_030_261_248


def test_prefill_flops_are_those_of_each_product() -> None:
    shape = Shape("s", 8, 12, 3, 4, 2, 5, 20, tied=True)
    tokens = 7
    matrices = [(8, 4 * 5), (8, 2 * 5), (8, 2 * 5), (4 * 5, 8), (8, 12), (8, 12), (12, 8)]
    expected = 0
    for _ in range(shape.num_layers):
        expected += sum(2 * rows * columns * tokens for rows, columns in matrices)
        for position in range(tokens):  # scores, and the weighted sum of values
            expected += 2 * 2 * shape.num_heads * shape.head_dim * (position + 1)
    expected += 2 * 8 * 20
    assert shape.prefill_flops(tokens) == expected


def test_mfu_needs_a_known_device() -> None:
    found = utilisation(FULL, SHAPES["8B"], 30_000.0, "NVIDIA H200", 800e12)
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / 989.5e12)
    assert 0.4 < found["mfu"] < 0.7  # 2 x 8e9 x 30,000 is 480 TFLOP/s
    assert found["of_a_matrix_product"] == pytest.approx(found["mfu"] * 989.5 / 800)
    assert utilisation(FULL, SHAPES["8B"], 30_000.0, "Some GPU", 800e12)["mfu"] is None


def test_slower_is_worse_whichever_way_the_metric_points() -> None:
    slower = _against("tpot_ms_batch_1", [10.0, 10.0, 10.0], [10.2, 10.2, 9.0], 0.01)
    assert (slower["slower"], slower["ok"]) == (pytest.approx(0.02), False)
    fewer = _against("prefill_tokens_per_s", [100.0], [95.0], 0.01)
    assert (round(fewer["slower"], 3), fewer["ok"]) == (0.053, False)
    assert _against("prefill_tokens_per_s", [100.0], [99.5], 0.01)["ok"]


def test_differences_say_where() -> None:
    found = _compared([[1, 2], [3, 4], [5]], [[1, 2], [3, 9], [5, 6]])
    assert (found["ok"], found["differs"], found["tokens"]) == (False, [(1, 1), (2, 1)], 6)


@pytest.mark.parametrize("settings", [FULL, DRY_RUN], ids=["full", "dry-run"])
def test_the_pool_holds_what_runs_at_a_time(settings: object) -> None:
    assert isinstance(settings, type(FULL))
    tokens = settings.num_blocks * settings.block_size_tokens
    assert tokens > max(settings.batches) * (settings.decode_prompt_tokens + settings.decode_new_tokens)
    assert tokens > settings.prefill_prompts * settings.prefill_tokens
    assert settings.context_length_tokens > settings.transfer_tokens + 2
    assert set(settings.shapes) <= set(SHAPES)


def test_a_wrong_token_is_found_out_and_rounding_is_not_one(tiny_llama: Path) -> None:
    prompt = [5, 6, 7, 8]
    right = greedy(tiny_llama, prompt, 6)
    found = verdict(str(tiny_llama), "cpu", "float32", [(prompt, right)])
    assert (found["ok"], found["best_in_float32"], found["tokens"]) == (True, 6, 6)
    wrong = [*right[:3], (right[3] + 1) % 256 + 3, *right[4:]]
    found = verdict(str(tiny_llama), "cpu", "float32", [(prompt, wrong)])
    assert not found["ok"]
    assert verdict(str(tiny_llama), "cpu", "bfloat16", [(prompt, right)])["rounding"] > 0


def test_what_is_missing_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", gpu_check.NEEDED | {"no_such_package": "no-such-package==1.0"})
    assert gpu_check.main(["--dry-run"]) == gpu_check.EXIT_MISSING
    assert "no_such_package is not installed: pip install no-such-package==1.0" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.recorded_machines import RecordedHost

    monkeypatch.setattr(
        "sagellm_common.comm_backend.hardware.select_device", lambda wanted: select_device(wanted, RecordedHost())
    )
    assert gpu_check.main([]) == gpu_check.EXIT_MISSING
    assert "engine.device: 'cuda' cannot be used here" in capsys.readouterr().err
