"""What the fit withstands."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.fitting import OnlineFit


def test_pauses_of_the_machine_do_not_move_the_fit() -> None:
    rng, fit = np.random.default_rng(3), OnlineFit((1.0, 1e3))
    for i in range(1000):
        tokens = float(rng.integers(1, 1000))
        seconds = (1e-3 + 1e-5 * tokens) * math.exp(rng.normal(0, 0.02))
        fit.observe((1.0, tokens), seconds + (0.5 if i % 50 == 49 else 0.0))
    assert fit.predict((1.0, 500)).seconds == pytest.approx(6e-3, rel=0.1)


def test_a_step_far_too_short_does_not_move_the_fit() -> None:
    rng, fit = np.random.default_rng(4), OnlineFit((1.0, 1e3))
    for i in range(1000):
        tokens = float(rng.integers(1, 1000))
        seconds = (1e-3 + 1e-5 * tokens) * math.exp(rng.normal(0, 0.02))
        fit.observe((1.0, tokens), 1e-6 if i % 50 == 49 else seconds)
    assert fit.predict((1.0, 500)).seconds == pytest.approx(6e-3, rel=0.1)


def test_coefficients_are_never_negative() -> None:
    fit = OnlineFit((1.0, 1e3, 1e6))
    for tokens in (100, 200, 300, 400, 500):  # falling cost: the free fit would have a negative slope
        fit.observe((1.0, tokens, tokens**2), 1e-2 - 1e-5 * tokens)
    assert min(fit.coefficients) >= 0
    assert fit.predict((1.0, 5000, 5000**2)).seconds > 0


@pytest.mark.parametrize(("features", "seconds"), [((1.0, math.nan), 1.0), ((1.0, -1.0), 1.0), ((1.0, 1.0), math.inf)])
def test_no_number_is_no_sample(features: tuple[float, float], seconds: float) -> None:
    fit = OnlineFit((1.0, 1.0))
    with pytest.raises(InvalidRequest, match="cannot be learned"):
        fit.observe(features, seconds)
    fit.observe((1.0, 1.0), 0.0)
    assert fit.samples == 0


def test_costs_are_means_however_much_others_take_of_the_machine() -> None:
    """Half of the steps take five times as long, and only the mean of many is what a queue of them takes."""
    rng, fit = np.random.default_rng(6), OnlineFit((1.0, 1e3))
    took_s = expected_s = 0.0
    for i in range(4000):
        tokens = float(rng.integers(1, 1000))
        seconds = (1e-3 + 1e-5 * tokens) * (5.0 if rng.random() < 0.5 else 1.0)
        if i >= 1000:
            took_s, expected_s = took_s + seconds, expected_s + fit.predict((1.0, tokens)).seconds
        fit.observe((1.0, tokens), seconds)
    assert expected_s == pytest.approx(took_s, rel=0.1)
