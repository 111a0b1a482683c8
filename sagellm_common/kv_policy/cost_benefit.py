"""Recompute, fetch or keep: what each costs in seconds, by models that are fitted to what was measured.

    recompute   fixed + per_token · t + per_token² · Σ position   the prompt's missing tokens, on this worker
    fetch       latency + bytes ÷ bandwidth                       from a slower tier or another machine
    keep        nothing now, but the room of the block

Pure: times come from whoever measures them. What is computed pays for the tokens before it as well, by attention; so a
block deep in a prompt is dearer than one at its beginning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

FORGET = 0.98
"""What a measurement counts for after the next one."""
MIN_SAMPLES = 4
"""Measurements before a fit is believed."""


class NonNegativeFit:
    """Least squares of relative errors, online: y = coefficients · x, none of them below 0, older samples count less.

    The terms are physical: a negative one would say that more work takes less time. With a handful of terms the best
    set of those above 0 is found by trying them all.
    """

    def __init__(self, num_terms: int, forget: float = FORGET) -> None:
        self._forget = forget
        self._products = np.zeros((num_terms, num_terms))
        self._targets = np.zeros(num_terms)
        self.samples = 0
        self.coefficients: tuple[float, ...] = (0.0,) * num_terms

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """`seconds` is more than 0."""
        x = np.asarray(terms, dtype=float) / seconds
        self._products = self._forget * self._products + np.outer(x, x)
        self._targets = self._forget * self._targets + x
        self.samples += 1
        self.coefficients = self._solve()

    def seconds(self, terms: Sequence[float]) -> float | None:
        """None before MIN_SAMPLES were seen."""
        if self.samples < MIN_SAMPLES:
            return None
        return sum(c * x for c, x in zip(self.coefficients, terms, strict=True))

    def _solve(self) -> tuple[float, ...]:
        count = len(self._targets)
        scale = np.sqrt(np.maximum(np.diag(self._products), 1e-300))
        products, targets = self._products / np.outer(scale, scale), self._targets / scale
        best, least = (0.0,) * count, math.inf
        for size in range(1, count + 1):
            for chosen in map(list, itertools.combinations(range(count), size)):
                found = np.linalg.lstsq(products[np.ix_(chosen, chosen)], targets[chosen], rcond=1e-9)[0]
                if np.any(found < 0):
                    continue
                # Σ w (1 − x·c)² but for a constant; of equals the one with fewer terms stays.
                error = float(found @ products[np.ix_(chosen, chosen)] @ found - 2 * found @ targets[chosen])
                if error < least - 1e-6:
                    least, full = error, np.zeros(count)
                    full[chosen] = found / scale[chosen]
                    best = tuple(full.tolist())
        return best


class Choice(StrEnum):
    RECOMPUTE = "recompute"
    FETCH = "fetch"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was chosen, and what both ways were expected to take; None where nothing is known yet."""

    choice: Choice
    recompute_s: float | None
    fetch_s: float | None

    @property
    def saved_s(self) -> float | None:
        """Over the other way."""
        if self.recompute_s is None or self.fetch_s is None:
            return None
        return abs(self.recompute_s - self.fetch_s)


class CostBenefitModel:
    """Of one worker and the place it fetches from. Not thread-safe.

    As long as either cost is unknown fetching is chosen: that is how it becomes known. A fit that says no for ever
    would never learn that things have changed, so every RETRY_EVERY-th no is a yes.
    """

    RETRY_EVERY = 32

    def __init__(self) -> None:
        self.prefill = NonNegativeFit(3)
        self.fetches = NonNegativeFit(2)
        self._refused = 0

    def computed(self, begin_token: int, end_token: int, seconds: float) -> None:
        """The prompt's tokens [begin, end) were computed, those before were there."""
        if seconds > 0 and end_token > begin_token:
            self.prefill.observe(_work(begin_token, end_token), seconds)

    def fetched(self, num_bytes: int, seconds: float) -> None:
        """All that it took, from asking to having."""
        if seconds > 0 and num_bytes > 0:
            self.fetches.observe((1.0, num_bytes), seconds)

    def recompute_s(self, begin_token: int, end_token: int) -> float | None:
        """Of tokens that are computed together with those after them; so without what a prompt costs at any rate."""
        _, tokens, attention = _work(begin_token, end_token)
        return self.prefill.seconds((0.0, tokens, attention))

    def fetch_s(self, num_bytes: int) -> float | None:
        return self.fetches.seconds((1.0, num_bytes))

    def choose(self, begin_token: int, end_token: int, num_bytes: int) -> Verdict:
        """For tokens [begin, end) of a prompt that goes on behind them, which are num_bytes away."""
        recompute_s, fetch_s = self.recompute_s(begin_token, end_token), self.fetch_s(num_bytes)
        if recompute_s is None or fetch_s is None or fetch_s <= recompute_s:
            return Verdict(Choice.FETCH, recompute_s, fetch_s)
        self._refused += 1
        again = self._refused % self.RETRY_EVERY == 0
        return Verdict(Choice.FETCH if again else Choice.RECOMPUTE, recompute_s, fetch_s)

    def keep_value_s(
        self, depth: int, block_size_tokens: int, reuse_probability: float, lower_s: float | None
    ) -> float:
        """Seconds that keeping a block saves on average: its reuse is spared the cheaper of computing it again and, if
        a slower tier has it too, fetching it from there in `lower_s`. 0 before prefill was measured."""
        again_s = self.recompute_s(depth * block_size_tokens, (depth + 1) * block_size_tokens)
        return reuse_probability * min(again_s or 0.0, math.inf if lower_s is None else lower_s)


def _work(begin_token: int, end_token: int) -> tuple[float, float, float]:
    """The terms of a prefill: one, its tokens, and the tokens that these attend to."""
    return 1.0, float(end_token - begin_token), (end_token**2 - begin_token**2) / 2
