"""What one thing adds to another on a machine whose own pace drifts: turns about, and how sure the difference is."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median of `count` values and the interval that holds it with CONFIDENCE (percentile bootstrap)."""

    value: float
    low: float
    high: float
    count: int

    def verdict(self, target: float) -> str:
        """Against an upper bound: decided only when all of the interval is on one side of it."""
        if self.high <= target:
            return "ok"
        return "MISSED" if self.low > target else "undecided: more turns, or a quieter machine"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.count}"


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value at least."""
    data = np.asarray(values)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(data, size=(RESAMPLES, len(data))), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(np.median(data)), float(low), float(high), len(data))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Of the values' distribution, whatever its form: between the k-th smallest and the k-th largest lies the median
    unless fewer than k values fall on one side of it, as coins fall (sign test). With too few values for such a
    confidence the interval has no end."""
    data, count = sorted(values), len(values)
    beyond, below = 0, 0.0
    while 2 * (below := below + math.comb(count, beyond) / 2**count) <= 1 - confidence:
        beyond += 1
    low, high = (data[beyond - 1], data[count - beyond]) if beyond else (-math.inf, math.inf)
    return Estimate(float(np.median(data)), low, high, count)


async def in_turns(
    base: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[T]], count: int
) -> tuple[list[T], list[T]]:
    """base, other, base, other, …, base: each of the `count` others has a base on either side."""
    bases, others = [await base()], []
    for _ in range(count):
        others.append(await other())
        bases.append(await base())
    return bases, others


def added(bases: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of `in_turns`: each other minus the mean of its two neighbours, which takes a steady drift out."""
    return [over - (before + after) / 2 for before, over, after in zip(bases, others, bases[1:], strict=False)]
