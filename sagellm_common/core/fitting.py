"""Costs fitted online: non-negative least squares of relative errors, with the uncertainty of what is predicted.

Errors are relative to what was *expected* (quasi-likelihood with a variance that grows with the mean squared,
Wedderburn 1974), so that costs are means, whatever the noise. Relative to what a step *took*, they would be those of
the quickest steps: on a machine that others use, too, sums of predictions came to a third of what these took.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import mul
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.errors import InvalidRequest

HALF_LIFE_SAMPLES = 2000
"""A sample counts half after this many newer ones: long enough to be steady, short enough to follow a new load."""
OUTLIER_SIGMAS = 3.0
"""A residual beyond this many standard deviations counts for less (Huber's weight): a pause of the machine is no cost
of the step."""
TOO_LITTLE = 4.0
"""What was expected counts as no less than what it took divided by this: where nobody was before, the fit may say
anything, nought included."""
ROBUST_AFTER_SAMPLES = 20
"""Until then a sample is its own expectation."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """`std_s` is one standard deviation of what a single step will take; infinite where nothing was learned yet."""

    seconds: float
    std_s: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, math.hypot(self.std_s, other.std_s))


class OnlineFit:
    """Non-negative linear least squares of *relative* errors, over exponentially forgotten samples.

    Keeps the normal equations only: a sample costs a rank-one update, a fit solves len(scale)² numbers. Features are
    divided by `scale` for conditioning. `mape` is prequential: each sample is predicted before it is learned.
    """

    def __init__(self, scale: Sequence[float], half_life_samples: float = HALF_LIFE_SAMPLES) -> None:
        self._scale = np.asarray(scale, np.float64)
        size = len(scale)
        self._gram: Vector = np.zeros((size, size))
        self._moment: Vector = np.zeros(size)
        self._square = 0.0
        self._weight = 0.0
        self._keep = 0.5 ** (1 / half_life_samples)
        self._solution: tuple[Vector, float, Vector] | None = None
        self._prediction: tuple[tuple[float, ...], float, tuple[tuple[float, ...], ...]] | None = None
        self.samples = 0
        self.mape = math.nan

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Ignores what took no time: a clock too coarse to say anything. Raises InvalidRequest for no finite number."""
        if not all(map(math.isfinite, (*features, seconds))) or min(*features, seconds) < 0:
            raise InvalidRequest(
                f"a sample of {seconds} s with features {list(features)} cannot be learned; all must be finite and at "
                "least 0"
            )
        if seconds == 0:
            return
        scaled = np.asarray(features, np.float64) / self._scale
        expected_s, weight = seconds, 1.0
        if self.samples:
            coefficients, sigma, _ = self._solve()
            predicted_s = float(scaled @ coefficients)
            known = 0.0 if math.isnan(self.mape) else self.mape
            share = max(1.0 - self._keep, 1.0 / self.samples)
            self.mape = known + share * (abs(predicted_s - seconds) / seconds - known)
            if self.samples >= ROBUST_AFTER_SAMPLES:
                expected_s = max(predicted_s, seconds / TOO_LITTLE)
                error = abs(seconds - predicted_s) / expected_s
                if error > OUTLIER_SIGMAS * sigma:
                    weight = OUTLIER_SIGMAS * max(sigma, 1e-3) / error
        row, target = scaled / expected_s, seconds / expected_s  # each sample asks for row · coefficients = target
        self._gram = self._keep * self._gram + weight * np.outer(row, row)
        self._moment = self._keep * self._moment + weight * target * row
        self._square = self._keep * self._square + weight * target * target
        self._weight = self._keep * self._weight + weight
        self._solution = self._prediction = None
        self.samples += 1

    def predict(self, features: Sequence[float]) -> Estimate:
        """Of one more sample: the spread of the samples around the fit, and how well these features are known."""
        if not self.samples:
            return Estimate(0.0, math.inf)
        coefficients, sigma, inverse = self._predictor()
        seconds = sum(map(mul, coefficients, features))
        known = sum(map(mul, features, [sum(map(mul, row, features)) for row in inverse]))
        spread = math.sqrt(seconds * seconds + max(0.0, known))  # known: in seconds², per unit of relative variance
        return Estimate(seconds, sigma * spread if spread else math.inf)

    def seconds(self, *features: float) -> float:
        """As `predict` without its uncertainty, which costs ten times as much."""
        return math.fsum(map(mul, self._predictor()[0], features))

    def _predictor(self) -> tuple[tuple[float, ...], float, tuple[tuple[float, ...], ...]]:
        """As `_solve`, per unit of each feature; without numpy: a placement asks dozens of times, and three numbers are
        no array."""
        if self._prediction is None:
            coefficients, sigma, inverse = self._solve()
            per_unit = tuple((coefficients / self._scale).tolist())
            rows = (inverse / np.outer(self._scale, self._scale)).tolist()
            self._prediction = per_unit, sigma, tuple(map(tuple, rows))
        return self._prediction

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Per unit of each feature; zeros before the first sample."""
        return self._predictor()[0]

    def _solve(self) -> tuple[Vector, float, Vector]:
        """(coefficients, relative standard deviation, inverse of the normal matrix), all in scaled features."""
        if self._solution is None:
            size = len(self._scale)
            ridge = 1e-9 * max(float(np.trace(self._gram)), 1e-300) * np.eye(size)
            gram = self._gram + ridge
            coefficients = _non_negative(gram, self._moment)
            # Σ w (row·x − target)², expanded over what is kept.
            left = float(coefficients @ self._gram @ coefficients - 2 * coefficients @ self._moment + self._square)
            freedom = self._weight - size
            sigma = math.sqrt(max(0.0, left) / freedom) if freedom > 0 else math.inf
            self._solution = coefficients, sigma, np.linalg.inv(gram).astype(np.float64)
        return self._solution

    def to_dict(self) -> dict[str, Any]:
        return {
            "gram": self._gram.tolist(),
            "moment": self._moment.tolist(),
            "square": self._square,
            "weight": self._weight,
            "samples": self.samples,
            "mape": None if math.isnan(self.mape) else self.mape,
        }

    def load(self, state: Mapping[str, Any]) -> Self:
        """Goes on where `to_dict` was taken. Raises KeyError, TypeError, ValueError for anything else."""
        gram, moment = np.asarray(state["gram"], np.float64), np.asarray(state["moment"], np.float64)
        if gram.shape != self._gram.shape or moment.shape != self._moment.shape:
            raise ValueError(f"{gram.shape} normal equations for {len(self._scale)} features")
        if not (np.isfinite(gram).all() and np.isfinite(moment).all()):
            raise ValueError("normal equations that are not finite")
        self._gram, self._moment = gram, moment
        self._square, self._weight = float(state["square"]), float(state["weight"])
        self.samples = int(state["samples"])
        self.mape = math.nan if state["mape"] is None else float(state["mape"])
        self._solution = self._prediction = None
        return self


def _non_negative(gram: Vector, moment: Vector) -> Vector:
    """argmin of xᵀ gram x − 2 xᵀ moment over x ≥ 0. Tries the supports: with three features there are seven."""
    size = len(moment)
    best, best_cost = np.zeros(size), 0.0
    for count in range(size, 0, -1):
        for support in combinations(range(size), count):
            chosen = list(support)
            part = np.linalg.solve(gram[np.ix_(chosen, chosen)], moment[chosen])
            cost = -float(part @ moment[chosen])
            if (part >= 0).all() and cost < best_cost:
                best, best_cost = np.zeros(size), cost
                best[chosen] = part
        if count == size and best_cost < 0:
            break  # the free optimum is non-negative, so nothing beats it
    return best
