"""Failpoints within a process; those that signal processes are what tests/faults is made of."""

from __future__ import annotations

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
