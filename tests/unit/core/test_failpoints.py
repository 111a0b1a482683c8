"""Failpoints within a process; those that signal processes are what tests/faults is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_common.core import failpoints


def test_the_first_to_pass_acts_and_only_while_it_is_armed() -> None:
    passed: list[str] = []
    with failpoints.armed("a", lambda: passed.append("a")):
        failpoints.hit("b")
        failpoints.hit("a")
        failpoints.hit("a")
    with failpoints.armed("a", lambda: passed.append("never")):
        pass
    failpoints.hit("a")
    assert passed == ["a"]


def test_a_delay_stays_and_holds_up_whoever_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(failpoints, "_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(failpoints.time, "sleep", waited.append)
    (tmp_path / "slow").write_text("delay_ms=2.5")
    for _ in range(2):
        failpoints.hit("slow")
        failpoints.hit("other")
    assert waited == [0.0025, 0.0025]
