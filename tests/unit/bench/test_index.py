"""`sagellm bench index`: what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.benchmarks.index import __main__ as command
from bench.benchmarks.index import measure
from sagellm_common.prefix_reuse import native


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("needs the compiled index: python -m sagellm_common.prefix_reuse.native")
    monkeypatch.setattr(command, "PROMPT_TOKENS", (1024, 2048))
    for name, value in (("LONGEST_TOKENS", 2048), ("PROMPTS", 4)):
        monkeypatch.setattr(measure, name, value)

    class Here:
        """In this process: a new one would not be so small."""

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, work: object, *args: object) -> Here:
            self.result = lambda: work(*args)  # type: ignore[operator]
            return self

    monkeypatch.setattr(command, "ProcessPoolExecutor", Here)


def test_it_writes_a_row_for_each_variant_order_and_length(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "index.json"
    assert command.main(["--workers=8", "--blocks=600", "--dict-blocks=500", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())
    assert [(row["variant"], row["order"], row["prompt_tokens"], row["blocks_per_worker"]) for row in rows] == [
        (variant, order, tokens, blocks)
        for variant, blocks in (("compiled", 600), ("dict", 500))
        for order in ("in order", "shuffled")
        for tokens in (1024, 2048)
    ]
    assert all(row["match_us"] > 0 and row["hash_us"] > 0 and row["told_bytes_per_block"] > 0 for row in rows)
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000


def test_too_few_workers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--workers=3"]) == 2
    assert "--workers must be at least 8" in capsys.readouterr().err
