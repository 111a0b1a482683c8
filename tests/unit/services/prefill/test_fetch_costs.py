"""When a prefill worker asks the store, and what it says it gained by that."""

from __future__ import annotations

import logging

import pytest

from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from services.prefill.fetch_costs import CHOICES, LOST_SECONDS, SAVED_SECONDS, FetchCosts
from tests.support.topology import LAYOUT

TOKENS = 64 * LAYOUT.block_size_tokens


def trained(fetch_s: float) -> FetchCosts:
    """1 ms per token to compute; so long to fetch TOKENS tokens, in proportion for fewer."""
    costs = FetchCosts(LAYOUT)
    for part in (1, 2, 4, 8, 1, 2, 4, 8):
        costs.computed(0, TOKENS // part, 1e-3 * TOKENS / part)
        costs.fetched(0, TOKENS // part, fetch_s / part)
    return costs


def test_a_store_is_asked_until_it_is_known_and_while_it_is_the_faster() -> None:
    assert FetchCosts(LAYOUT).worth_asking("r", 0, TOKENS)
    assert trained(fetch_s=0.5e-3 * TOKENS).worth_asking("r", 0, TOKENS)


def test_a_slow_store_is_not_asked_and_the_log_has_what_it_would_have_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    costs = trained(fetch_s=2e-3 * TOKENS)
    before = CHOICES.labels("recompute")._value.get()
    with caplog.at_level(logging.DEBUG, logger="services.prefill.fetch_costs"):
        assert not costs.worth_asking("r7", 0, TOKENS)
    assert CHOICES.labels("recompute")._value.get() == before + 1
    assert "request r7: tokens 0 to" in caplog.text and ": recompute; computing" in caplog.text


def test_who_always_fetches_learns_all_the_same_and_tells_what_computing_costs() -> None:
    told: list[RecomputeCost] = []
    costs = FetchCosts(LAYOUT, always=True, learned=told.append)
    for part in (1, 2, 4, 8, 1, 2, 4, 8):
        costs.computed(0, TOKENS // part, 1e-3 * TOKENS / part)
        costs.fetched(0, TOKENS // part, 1.0)
    assert costs.worth_asking("r", 0, TOKENS)
    assert told[-1].seconds(0, TOKENS) == pytest.approx(1e-3 * TOKENS, rel=0.05)


def test_seconds_saved_and_lost_are_counted() -> None:
    costs = trained(fetch_s=1e-3 * TOKENS)
    saved, lost = SAVED_SECONDS._value.get(), LOST_SECONDS._value.get()
    costs.fetched(0, TOKENS, 0.25e-3 * TOKENS)
    assert SAVED_SECONDS._value.get() - saved == pytest.approx(0.75e-3 * TOKENS, rel=1e-3)
    costs.fetched(0, TOKENS, 3e-3 * TOKENS)
    assert LOST_SECONDS._value.get() - lost == pytest.approx(2e-3 * TOKENS, rel=1e-3)
    costs.fetched(0, 0, 1.0)
    assert LOST_SECONDS._value.get() - lost == pytest.approx(2e-3 * TOKENS, rel=1e-3), "a miss brings nothing to judge"
