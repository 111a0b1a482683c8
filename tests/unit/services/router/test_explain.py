from __future__ import annotations

import pytest

from sagellm_common.core.errors import InvalidRequest
from services.router.explain import MAX_EVENTS, ExplainLog


def test_only_the_latest_requests_are_kept() -> None:
    log = ExplainLog(max_requests=2)
    for request_id in ("a", "b", "a", "c"):
        log.begin(request_id)
    assert log.get("b") is None and log.get("a") is not None
    with pytest.raises(InvalidRequest, match="'b' is not among the latest 2"):
        log.require("b")


def test_an_id_that_comes_again_starts_afresh() -> None:
    log = ExplainLog()
    log.begin("a").add("admit", 0.0, 1.0)
    assert log.begin("a").events == []


def test_events_are_bounded() -> None:
    explanation = ExplainLog().begin("a")
    for _ in range(2 * MAX_EVENTS):
        explanation.add("reserve", 0.0, 1.0)
    assert len(explanation.events) == MAX_EVENTS
