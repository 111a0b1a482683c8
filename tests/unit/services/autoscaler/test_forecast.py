"""Level, trend, season, and what is said of the errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sagellm_common.core.errors import InvalidRequest
from services.autoscaler.forecast import Forecast


def test_a_steady_load_is_forecast_as_it_is() -> None:
    forecast = Forecast(horizon_bins=4)
    for _ in range(50):
        forecast.observe(10.0)
    assert forecast.predict().value == pytest.approx(10.0)
    assert forecast.predict().upper(3) == pytest.approx(10.0)
    assert forecast.mape == pytest.approx(0.0)


def test_a_rise_is_followed_ahead_and_levels_off() -> None:
    forecast = Forecast(horizon_bins=3)
    for i in range(60):
        forecast.observe(10.0 + 2.0 * i)
    now = 10.0 + 2.0 * 59
    assert now < forecast.predict(3).value < now + 2 * 3 + 10
    assert forecast.predict(500).value < now + 40, "a trend does not go on for ever"


def test_a_season_is_known_once_it_was_seen() -> None:
    def at(i: int) -> float:
        return 100 + 50 * math.sin(2 * math.pi * i / 24)

    seasonal, plain = Forecast(6, season_bins=24), Forecast(6)
    for i in range(24 * 6):
        seasonal.observe(at(i))
        plain.observe(at(i))
    assert seasonal.mape < 0.5 * plain.mape
    for ahead in range(1, 24):
        assert seasonal.predict(ahead).value == pytest.approx(at(24 * 6 - 1 + ahead), rel=0.15)


def test_the_spread_is_that_of_past_errors_at_the_horizon() -> None:
    rng, forecast = np.random.default_rng(0), Forecast(2)
    misses, said = [], []
    for _ in range(3000):
        value = float(rng.poisson(50))
        if len(said) >= 2:
            misses.append(value - said[-2])
        forecast.observe(value)
        said.append(forecast.predict().value)
    assert forecast.predict().std == pytest.approx(float(np.std(misses)), rel=0.4)


def test_nothing_is_forecast_below_zero() -> None:
    forecast = Forecast(5)
    for value in (100.0, 50.0, 10.0, 0.0, 0.0):
        forecast.observe(value)
    assert forecast.predict().value == 0.0
    assert math.isfinite(forecast.predict().std)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_no_number_is_no_bin(value: float) -> None:
    with pytest.raises(InvalidRequest, match="cannot be forecast from"):
        Forecast().observe(value)


@pytest.mark.parametrize(("horizon", "season"), [(0, 0), (1, -1)])
def test_bad_shapes_are_refused(horizon: int, season: int) -> None:
    with pytest.raises(InvalidRequest, match="must be at least"):
        Forecast(horizon, season)
