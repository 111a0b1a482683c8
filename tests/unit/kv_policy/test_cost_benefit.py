"""Costs learned from measurements, and what is chosen by them."""

from __future__ import annotations

import random

import pytest

from sagellm_common.kv_policy.cost_benefit import MAX_PLACES, MIN_SAMPLES, Choice, CostBenefitModel, RecomputeCost

FIXED_S, TOKEN_S, ATTENTION_S = 5e-3, 2e-4, 3e-8
LATENCY_S, BYTES_PER_S = 1e-3, 2e9


def compute_s(begin: int, end: int) -> float:
    return FIXED_S + TOKEN_S * (end - begin) + ATTENTION_S * (end**2 - begin**2) / 2


def trained(slower: float = 1.0, samples: int = 60, noise: float = 0.05) -> CostBenefitModel:
    """Of a worker with the costs above; fetching takes `slower` times as long."""
    model, rng = CostBenefitModel(), random.Random(0)
    for _ in range(samples):
        begin, num_bytes = rng.randrange(0, 4000), rng.randrange(1 << 16, 1 << 26)
        end = begin + rng.randrange(16, 8000)
        model.computed(begin, end, compute_s(begin, end) * rng.uniform(1 - noise, 1 + noise))
        model.fetched(num_bytes, slower * (LATENCY_S + num_bytes / BYTES_PER_S) * rng.uniform(1 - noise, 1 + noise))
    return model


def test_both_costs_are_found_in_noise() -> None:
    model = trained()
    expected = compute_s(1000, 3000) - FIXED_S
    assert model.recompute_s(1000, 3000) == pytest.approx(expected, rel=0.1)
    assert model.fetch_s(8 << 20) == pytest.approx(LATENCY_S + (8 << 20) / BYTES_PER_S, rel=0.1)


def test_the_cheaper_way_is_chosen_and_the_other_told() -> None:
    model = trained()
    long = model.choose(0, 4096, 16 << 20)
    assert long.choice is Choice.FETCH
    assert long.saved_s == pytest.approx(compute_s(0, 4096) - FIXED_S - LATENCY_S - (16 << 20) / BYTES_PER_S, rel=0.1)
    assert model.choose(0, 16, 16 << 20).choice is Choice.RECOMPUTE


def test_what_is_not_known_is_tried() -> None:
    model = CostBenefitModel()
    for _ in range(MIN_SAMPLES):
        verdict = model.choose(0, 16, 1 << 30)
        assert (verdict.choice, verdict.saved_s) == (Choice.FETCH, None)
        model.computed(0, 100, 0.02)
        model.fetched(1 << 20, 1.0)
    assert model.choose(0, 16, 1 << 30).choice is Choice.RECOMPUTE


def test_a_refusal_is_not_for_ever() -> None:
    model = trained(slower=1000)
    choices = [model.choose(0, 512, 16 << 20).choice for _ in range(2 * model.RETRY_EVERY)]
    assert choices.count(Choice.FETCH) == 2
    for _ in range(300):  # the store has become fast, and older measurements fade
        for num_bytes in (1 << 16, 1 << 20, 1 << 26):
            model.fetched(num_bytes, LATENCY_S + num_bytes / BYTES_PER_S)
    assert model.choose(0, 4096, 16 << 20).choice is Choice.FETCH


def test_a_block_is_worth_keeping_for_what_it_spares() -> None:
    model = trained()
    deep, first = (model.keep_value_s(depth, 16, 0.5, None) for depth in (2000, 0))
    assert deep > 1.5 * first > 0
    assert model.keep_value_s(2000, 16, 0.5, 1e-6) == pytest.approx(0.5e-6)
    assert CostBenefitModel().keep_value_s(0, 16, 1.0, None) == 0.0


def test_blocks_cost_more_the_deeper_they_are() -> None:
    assert CostBenefitModel().recompute_cost() is None
    model = trained()
    known = model.recompute_cost()
    assert known is not None
    assert known.seconds(1000, 3000) == pytest.approx(model.recompute_s(1000, 3000), rel=1e-3)
    cost = known.per_block(16)
    assert cost(0) == 1.0
    for depth in (1, 1000):
        in_seconds = known.seconds(16 * depth, 16 * (depth + 1)) / known.seconds(0, 16)
        assert cost(depth) == pytest.approx(in_seconds)
    assert RecomputeCost(0.0, 0.0).per_block(16)(1000) == 1.0


def test_what_took_no_time_teaches_nothing() -> None:
    model = CostBenefitModel()
    model.computed(0, 0, 1.0)
    model.computed(0, 5, 0.0)
    model.fetched(0, 1.0)
    model.fetched(5, 0.0)
    assert model.prefill.samples == 0 and not model.fetches


def test_each_place_has_costs_of_its_own() -> None:
    model = trained()
    for _ in range(MIN_SAMPLES):
        assert model.choose(0, 4096, 16 << 20, "far away").choice is Choice.FETCH, "it is not known yet"
        model.fetched(1 << 20, 10.0, "far away")
    assert model.choose(0, 4096, 16 << 20, "far away").choice is Choice.RECOMPUTE
    assert model.choose(0, 4096, 16 << 20).choice is Choice.FETCH
    for n in range(2 * MAX_PLACES):
        model.fetched(1 << 20, 1.0, f"worker-{n}")
    assert len(model.fetches) == MAX_PLACES
