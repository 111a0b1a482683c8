"""What comes next in a series of counts: level, damped trend and season, learned online, with its own error.

Holt-Winters' additive method with Gardner and McKenzie's damped trend, as in Hyndman and Athanasopoulos, "Forecasting:
Principles and Practice", chapter 8. The season joins once a whole one was seen; until then it is zero.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from sagellm_common.core.errors import InvalidRequest

LEVEL_GAIN = 0.4
TREND_GAIN = 0.15
SEASON_GAIN = 0.3
DAMPING = 0.9
"""A trend goes on for about ten bins: load that doubled in a minute does not double every minute."""
ERROR_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class Prediction:
    """`std` is the standard deviation of what past predictions of that distance were wrong by."""

    value: float
    std: float

    def upper(self, sigmas: float) -> float:
        return self.value + sigmas * self.std


class Forecast:
    """Of one quantity, counted in bins of equal length. `horizon_bins` ahead is what it is held to.

    `season_bins` 0 is for series that do not repeat. Pure: time is the number of `observe` calls.
    """

    def __init__(self, horizon_bins: int = 1, season_bins: int = 0) -> None:
        if horizon_bins < 1 or season_bins < 0:
            raise InvalidRequest(
                f"horizon_bins {horizon_bins} must be at least 1, season_bins {season_bins} at least 0"
            )
        self._horizon = horizon_bins
        self._season = [0.0] * season_bins
        self._first_season: list[float] = []
        self._level = self._trend = 0.0
        self._seen = 0
        self._due: deque[float] = deque()
        """What was said of the bins to come, the next one first."""
        self._square_error = 0.0
        self._error_sum = self._actual_sum = 0.0
        self._judged = 0

    def observe(self, value: float) -> None:
        """The next bin's. Raises InvalidRequest for what is no finite number of at least 0."""
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"a bin of {value} cannot be forecast from; it must be finite and at least 0")
        if len(self._due) >= self._horizon:
            self._judge(self._due.popleft(), value)
        self._learn(value)
        self._seen += 1
        self._due.append(self._at(self._horizon))

    def predict(self, bins: int | None = None) -> Prediction:
        """`bins` from now (default: the horizon)."""
        return Prediction(self._at(bins or self._horizon), self._std())

    @property
    def mape(self) -> float:
        """Error of the predictions at the horizon over what came, both summed: bins with nothing in them have no
        percentage of their own. NaN before the first."""
        return self._error_sum / self._actual_sum if self._actual_sum else math.nan

    def _learn(self, value: float) -> None:
        if self._seen == 0:
            self._level = value
            self._learn_season(value)
            return
        seasonal = self._seasonal(self._seen)
        before = self._level
        expected = before + DAMPING * self._trend
        self._level = LEVEL_GAIN * (value - seasonal) + (1 - LEVEL_GAIN) * expected
        self._trend = TREND_GAIN * (self._level - before) + (1 - TREND_GAIN) * DAMPING * self._trend
        self._learn_season(value)

    def _learn_season(self, value: float) -> None:
        length = len(self._season)
        if not length:
            return
        if self._seen < length:
            self._first_season.append(value)
            if self._seen == length - 1:
                mean = sum(self._first_season) / length
                self._season = [one - mean for one in self._first_season]
                self._level, self._trend = mean, 0.0
            return
        at = self._seen % length
        self._season[at] += SEASON_GAIN * (value - self._level - self._season[at])

    def _seasonal(self, bin_index: int) -> float:
        return self._season[bin_index % len(self._season)] if self._season and self._seen >= len(self._season) else 0.0

    def _at(self, bins: int) -> float:
        damped = sum(DAMPING**i for i in range(1, bins + 1))
        return max(0.0, self._level + damped * self._trend + self._seasonal(self._seen - 1 + bins))

    def _judge(self, predicted: float, actual: float) -> None:
        error = predicted - actual
        self._error_sum += abs(error)
        self._actual_sum += actual
        self._judged += 1
        gain = max(ERROR_GAIN, 1 / self._judged)
        self._square_error += gain * (error * error - self._square_error)

    def _std(self) -> float:
        """Before anything was judged: counts of independent arrivals vary by their root."""
        return math.sqrt(self._square_error) if self._judged else math.sqrt(max(0.0, self._level))
