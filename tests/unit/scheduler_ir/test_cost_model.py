"""The fitted cost model against costs that are known because the test makes them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.fitting import HALF_LIFE_SAMPLES
from sagellm_common.scheduler_ir.cost_model import CostModel, DecodeFit


def prefill_seconds(start: int, end: int, slowdown: float = 1.0) -> float:
    return slowdown * (2e-3 + 4e-5 * (end - start) + 3e-9 * (end * end - start * start))


def trained(noise: float, seed: int = 0, steps: int = 400) -> CostModel:
    rng, model = np.random.default_rng(seed), CostModel()
    for _ in range(steps):
        start = int(rng.integers(0, 4096))
        end = start + int(rng.integers(1, 2048))
        model.observe_prefill([(start, end)], prefill_seconds(start, end) * math.exp(rng.normal(0, noise)))
        batch = int(rng.integers(1, 33))
        context = batch * int(rng.integers(16, 4096))
        cost = 1e-3 + 2e-8 * context + (1e-4 if batch < 5 else 3e-4) * batch
        model.observe_decode(batch, context, cost * math.exp(rng.normal(0, noise)))
        size = int(rng.integers(1 << 14, 1 << 26))
        model.observe_transfer("p0", "d0", size, (3e-4 + size / 2e9) * math.exp(rng.normal(0, noise)))
    return model


def test_finds_the_costs_that_made_the_samples() -> None:
    model = trained(noise=0.0)
    assert model.prefill.coefficients == pytest.approx((2e-3, 4e-5, 3e-9), rel=1e-3)
    assert model.prefill_s([(512, 1536)]).seconds == pytest.approx(prefill_seconds(512, 1536), rel=1e-4)
    assert model.decode_s(2, 4000).seconds == pytest.approx(1e-3 + 8e-5 + 2e-4, rel=1e-3)
    assert model.decode_s(20, 4000).seconds == pytest.approx(1e-3 + 8e-5 + 6e-3, rel=1e-3)
    for batch in (1, 2, 20):
        assert model.decode_mean_s(batch, 4000) == pytest.approx(model.decode_s(batch, 4000).seconds)
    assert model.transfer_s("p0", "d0", 1 << 24).seconds == pytest.approx(3e-4 + (1 << 24) / 2e9, rel=1e-3)


def test_a_chunked_prompt_costs_as_the_whole_one_but_for_the_steps() -> None:
    model = trained(noise=0.0)
    whole, halves = model.prefill_s([(0, 2048)]), model.prefill_s([(0, 1024)]) + model.prefill_s([(1024, 2048)])
    assert halves.seconds - whole.seconds == pytest.approx(model.prefill.coefficients[0], rel=1e-3)


def test_the_spread_covers_what_comes_next_and_the_error_is_reported() -> None:
    model, rng = trained(noise=0.05, seed=1), np.random.default_rng(2)
    inside = 0
    for _ in range(300):
        end = int(rng.integers(16, 4096))
        estimate = model.prefill_s([(0, end)])
        seen = prefill_seconds(0, end) * math.exp(rng.normal(0, 0.05))
        inside += abs(seen - estimate.seconds) <= 2 * estimate.std_s
    assert inside >= 270  # two standard deviations: 95 % of 300, less what chance takes
    assert 0.02 < model.prefill.mape < 0.08
    assert 0.02 < model.decode.mape < 0.08


def test_follows_a_worker_that_became_slower() -> None:
    rng, model = np.random.default_rng(4), trained(noise=0.02)
    for _ in range(4 * HALF_LIFE_SAMPLES):
        end = int(rng.integers(16, 4096))
        model.observe_prefill([(0, end)], prefill_seconds(0, end, slowdown=2.0) * math.exp(rng.normal(0, 0.02)))
    assert model.prefill_s([(0, 2000)]).seconds == pytest.approx(prefill_seconds(0, 2000, slowdown=2.0), rel=0.1)


def test_what_nobody_has_seen_is_said_to_be_unknown() -> None:
    model = CostModel()
    for estimate in (model.prefill_s([(0, 10)]), model.decode_s(1, 10), model.transfer_s("a", "b", 10)):
        assert estimate.std_s == math.inf
    model.observe_prefill([(0, 10)], 1e-3)
    assert model.prefill_s([(0, 10)]).std_s == math.inf  # one sample says nothing of the spread
    assert math.isnan(model.decode.mape)


def test_an_unseen_regime_and_an_unseen_link_are_answered_by_their_neighbours() -> None:
    fit = DecodeFit()
    for context in range(100, 1000, 10):
        batch = 2 + context // 10 % 3
        fit.observe(batch, context, 1e-3 + 1e-6 * context + 1e-4 * batch)
    assert fit.predict(64, 500).seconds == pytest.approx(1.5e-3 + 64e-4, rel=0.01)
    model = CostModel()
    for size in range(1 << 16, 1 << 20, 1 << 16):
        model.observe_transfer("p0", "d0", size, 1e-3 + size / 1e9)
        model.observe_transfer("p1", "d0", size, 1e-3 + size / 5e8)
    between = model.transfer_s("p2", "d9", 1 << 19)
    fast, slow = model.transfer_s("p0", "d0", 1 << 19), model.transfer_s("p1", "d0", 1 << 19)
    assert fast.seconds < between.seconds < slow.seconds
    assert between.std_s > fast.std_s


def test_goes_on_after_a_restart() -> None:
    model = trained(noise=0.05)
    again = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again.to_dict() == model.to_dict()
    for kept in (model, again):
        kept.observe_prefill([(0, 100)], 1e-2)
        kept.observe_decode(3, 100, 1e-2)
    assert again.prefill_s([(7, 99)]) == model.prefill_s([(7, 99)])
    assert again.decode_s(3, 99) == model.decode_s(3, 99)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 7},
        {"prefill": None},
        {"decode": {"starts": [1, 2], "fits": []}},
        {"prefill": {"gram": [[math.nan]], "moment": [0], "weight": 1, "samples": 1, "mape": None}},
    ],
    ids=["another format", "no fit", "regimes without fits", "another shape"],
)
def test_a_broken_file_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="cost model"):
        CostModel.from_dict({**trained(0.0, steps=3).to_dict(), **change})
