"""Recompute, fetch or keep: what each costs in seconds, by models that are fitted to what was measured.

    recompute   fixed + per_token · t + per_token² · Σ position   the prompt's missing tokens, on this worker
    fetch       latency + bytes ÷ bandwidth                       from a slower tier or another machine
    keep        nothing now, but the room of the block

Pure: times come from whoever measures them. What is computed pays for the tokens before it as well, by attention; so a
block deep in a prompt is dearer than one at its beginning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sagellm_common.core.fitting import OnlineFit
from sagellm_common.kv_policy.eviction import Cost

HALF_LIFE_SAMPLES = 32
"""Few enough to follow a store that becomes slow: here one choice hangs on it, not a whole cluster's placement."""
MIN_SAMPLES = 4
"""Measurements before a fit is believed."""
MAX_PLACES = 1024
"""Beyond that the one known longest is forgotten: workers come and go, and with them their names."""


class Choice(StrEnum):
    RECOMPUTE = "recompute"
    FETCH = "fetch"


@dataclass(frozen=True, slots=True)
class RecomputeCost:
    """Of prompt tokens, in seconds per token and per token that it attends to."""

    token_s: float
    attention_s: float

    def seconds(self, begin_token: int, end_token: int) -> float:
        """Of tokens [begin, end) that are computed together with others."""
        _, tokens, attention = _work(begin_token, end_token)
        return self.token_s * tokens + self.attention_s * attention

    def per_block(self, block_size_tokens: int) -> Cost:
        """A block's cost by its number in its sequence, in units of the first one's."""
        first_s = self.seconds(0, block_size_tokens)
        growth = self.attention_s * block_size_tokens**2 / first_s if first_s > 0 else 0.0
        return lambda depth: 1.0 + growth * depth


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
    """Of one worker and the `places` it fetches from, each with costs of its own. Not thread-safe.

    As long as either cost is unknown fetching is chosen: that is how it becomes known. A fit that says no for ever
    would never learn that things have changed, so every RETRY_EVERY-th no is a yes.
    """

    RETRY_EVERY = 32

    def __init__(self) -> None:
        self.prefill = OnlineFit((1.0, 1e3, 1e6), HALF_LIFE_SAMPLES)
        self.fetches: dict[str, OnlineFit] = {}
        """By place."""
        self._refused: Counter[str] = Counter()

    def computed(self, begin_token: int, end_token: int, seconds: float) -> None:
        """The prompt's tokens [begin, end) were computed, those before were there."""
        if seconds > 0 and end_token > begin_token:
            self.prefill.observe(_work(begin_token, end_token), seconds)

    def fetched(self, num_bytes: int, seconds: float, place: str = "") -> None:
        """All that it took, from asking to having."""
        if seconds > 0 and num_bytes > 0:
            if place not in self.fetches:
                if len(self.fetches) >= MAX_PLACES:
                    del self.fetches[next(iter(self.fetches))]
                self.fetches[place] = OnlineFit((1.0, 1e8), HALF_LIFE_SAMPLES)
            self.fetches[place].observe((1.0, num_bytes), seconds)

    def recompute_s(self, begin_token: int, end_token: int) -> float | None:
        """Of tokens that are computed together with those after them; so without what a prompt costs at any rate."""
        _, tokens, attention = _work(begin_token, end_token)
        return _seconds(self.prefill, (0.0, tokens, attention))

    def recompute_cost(self) -> RecomputeCost | None:
        """What `recompute_s` goes by, as a value; None as long as nothing is known."""
        if self.prefill.samples < MIN_SAMPLES:
            return None
        _, token_s, attention_s = self.prefill.coefficients
        return RecomputeCost(token_s, attention_s)

    def fetch_s(self, num_bytes: int, place: str = "") -> float | None:
        fit = self.fetches.get(place)
        return _seconds(fit, (1.0, num_bytes)) if fit else None

    def choose(self, begin_token: int, end_token: int, num_bytes: int, place: str = "") -> Verdict:
        """For tokens [begin, end) of a prompt that goes on behind them, which are num_bytes away."""
        recompute_s, fetch_s = self.recompute_s(begin_token, end_token), self.fetch_s(num_bytes, place)
        if recompute_s is None or fetch_s is None or fetch_s <= recompute_s:
            return Verdict(Choice.FETCH, recompute_s, fetch_s)
        self._refused[place] += 1
        again = self._refused[place] % self.RETRY_EVERY == 0
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


def _seconds(fit: OnlineFit, terms: Sequence[float]) -> float | None:
    return fit.predict(terms).seconds if fit.samples >= MIN_SAMPLES else None
