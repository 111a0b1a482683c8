"""What a step and a transfer cost in seconds, fitted online: one model for routing, autoscaling and simulation.

    prefill step    a + b·Σ tokens + c·Σ (end² − start²)    the last term is attention: token i reads the i before it
    decode step     a + b·Σ context + c·batch                one fit per regime of batch sizes
    transfer        latency + bytes / bandwidth              one fit per link

The forms are those of DistServe's simulator (Zhong et al., OSDI'24, appendix A), with a chunk of a prompt in place of
the whole. Coefficients are never negative: a step does not get cheaper by doing more.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.errors import InvalidRequest

FORMAT = 1
HALF_LIFE_SAMPLES = 2000
"""A sample counts half after this many newer ones: long enough to be steady, short enough to follow a new load."""
OUTLIER_SIGMAS = 3.0
"""A residual beyond this many standard deviations counts for less (Huber's weight): a pause of the machine is no cost
of the step."""
ROBUST_AFTER_SAMPLES = 20
REGIME_STARTS = (1, 2, 5, 17, 65)
"""Smallest batch of each decode regime: kernels tile the batch, and from some size on compute, not memory, limits."""

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

    def __init__(self, scale: Sequence[float]) -> None:
        self._scale = np.asarray(scale, np.float64)
        size = len(scale)
        self._gram: Vector = np.zeros((size, size))
        self._moment: Vector = np.zeros(size)
        self._weight = 0.0
        self._keep = 0.5 ** (1 / HALF_LIFE_SAMPLES)
        self._solution: tuple[Vector, float, Vector] | None = None
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
        row = scaled / seconds  # relative: each sample asks for row · coefficients = 1
        weight = 1.0
        if self.samples:
            coefficients, sigma, _ = self._solve()
            error = abs(float(row @ coefficients) - 1.0)
            known = 0.0 if math.isnan(self.mape) else self.mape
            share = max(1.0 - self._keep, 1.0 / self.samples)
            self.mape = known + share * (error - known)
            if self.samples >= ROBUST_AFTER_SAMPLES and error > OUTLIER_SIGMAS * sigma:
                weight = OUTLIER_SIGMAS * max(sigma, 1e-3) / error
        self._gram = self._keep * self._gram + weight * np.outer(row, row)
        self._moment = self._keep * self._moment + weight * row
        self._weight = self._keep * self._weight + weight
        self._solution = None
        self.samples += 1

    def predict(self, features: Sequence[float]) -> Estimate:
        """Of one more sample: the spread of the samples around the fit, and how well these features are known."""
        if not self.samples:
            return Estimate(0.0, math.inf)
        coefficients, sigma, inverse = self._solve()
        scaled = np.asarray(features, np.float64) / self._scale
        seconds = float(scaled @ coefficients)
        known = float(scaled @ inverse @ scaled)  # in seconds², per unit of relative variance
        spread = math.sqrt(seconds * seconds + max(0.0, known))
        return Estimate(seconds, sigma * spread if spread else math.inf)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Per unit of each feature; zeros before the first sample."""
        return tuple(float(c) for c in self._solve()[0] / self._scale)

    def _solve(self) -> tuple[Vector, float, Vector]:
        """(coefficients, relative standard deviation, inverse of the normal matrix), all in scaled features."""
        if self._solution is None:
            size = len(self._scale)
            ridge = 1e-9 * max(float(np.trace(self._gram)), 1e-300) * np.eye(size)
            gram = self._gram + ridge
            coefficients = _non_negative(gram, self._moment)
            # Σ w (row·x − 1)², expanded over what is kept.
            left = float(coefficients @ self._gram @ coefficients - 2 * coefficients @ self._moment + self._weight)
            freedom = self._weight - size
            sigma = math.sqrt(max(0.0, left) / freedom) if freedom > 0 else math.inf
            self._solution = coefficients, sigma, np.linalg.inv(gram).astype(np.float64)
        return self._solution

    def to_dict(self) -> dict[str, Any]:
        return {
            "gram": self._gram.tolist(),
            "moment": self._moment.tolist(),
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
        self._gram, self._moment, self._weight = gram, moment, float(state["weight"])
        self.samples = int(state["samples"])
        self.mape = math.nan if state["mape"] is None else float(state["mape"])
        self._solution = None
        return self


class DecodeFit:
    """One fit per regime of batch sizes; a regime that nobody has seen is answered by the nearest one that was."""

    def __init__(self, starts: Sequence[int] = REGIME_STARTS) -> None:
        self._starts = tuple(starts)
        self._fits = [OnlineFit(_DECODE_SCALE) for _ in starts]

    def observe(self, num_sequences: int, context_tokens: int, seconds: float) -> None:
        self._fits[self._regime(num_sequences)].observe((1.0, context_tokens, num_sequences), seconds)

    def predict(self, num_sequences: int, context_tokens: int) -> Estimate:
        wanted = self._regime(num_sequences)
        known = [i for i, fit in enumerate(self._fits) if fit.samples]
        nearest = min(known, key=lambda i: (abs(i - wanted), i), default=wanted)
        return self._fits[nearest].predict((1.0, context_tokens, num_sequences))

    @property
    def samples(self) -> int:
        return sum(fit.samples for fit in self._fits)

    @property
    def mape(self) -> float:
        """Over all regimes, each by its share of the samples."""
        seen = [fit for fit in self._fits if not math.isnan(fit.mape)]
        return sum(fit.mape * fit.samples for fit in seen) / sum(fit.samples for fit in seen) if seen else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {"starts": list(self._starts), "fits": [fit.to_dict() for fit in self._fits]}

    def load(self, state: Mapping[str, Any]) -> Self:
        self._starts = tuple(int(start) for start in state["starts"])
        if not self._starts or len(self._starts) != len(state["fits"]) or sorted(set(self._starts)) != [*self._starts]:
            raise ValueError(f"decode regimes {self._starts} do not fit their {len(state['fits'])} fits")
        self._fits = [OnlineFit(_DECODE_SCALE).load(fit) for fit in state["fits"]]
        return self

    def _regime(self, num_sequences: int) -> int:
        return max(0, bisect.bisect_right(self._starts, num_sequences) - 1)


class CostModel:
    """Of one kind of worker serving one model. Not thread-safe; predictions take microseconds."""

    def __init__(self) -> None:
        self.prefill = OnlineFit(_PREFILL_SCALE)
        self.decode = DecodeFit()
        self.links: dict[tuple[str, str], OnlineFit] = {}
        """(source, target) worker ids → fit of (1, bytes)."""

    # ---- what is measured ----

    def observe_prefill(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """One step computed tokens [start, end) of each of these prompts."""
        self.prefill.observe(_prefill_features(chunks), seconds)

    def observe_decode(self, num_sequences: int, context_tokens: int, seconds: float) -> None:
        """One step made one token for each sequence; `context_tokens` is the sum of what they attended to."""
        self.decode.observe(num_sequences, context_tokens, seconds)

    def observe_transfer(self, source_id: str, target_id: str, num_bytes: int, seconds: float) -> None:
        self.links.setdefault((source_id, target_id), OnlineFit(_LINK_SCALE)).observe((1.0, num_bytes), seconds)

    # ---- what will be ----

    def prefill_s(self, chunks: Iterable[tuple[int, int]]) -> Estimate:
        return self.prefill.predict(_prefill_features(chunks))

    def decode_s(self, num_sequences: int, context_tokens: int) -> Estimate:
        return self.decode.predict(num_sequences, context_tokens)

    def transfer_s(self, source_id: str, target_id: str, num_bytes: int) -> Estimate:
        """Of a link nobody measured: as the mean of those that were."""
        features = (1.0, float(num_bytes))
        if (fit := self.links.get((source_id, target_id))) is not None:
            return fit.predict(features)
        known = [fit.predict(features) for fit in self.links.values()]
        if not known:
            return Estimate(0.0, math.inf)
        mean = sum(estimate.seconds for estimate in known) / len(known)
        spread = math.sqrt(sum((estimate.seconds - mean) ** 2 for estimate in known) / len(known))
        return Estimate(mean, spread + max(estimate.std_s for estimate in known))

    # ---- kept over a restart ----

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for `from_dict`."""
        return {
            "format": FORMAT,
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "links": [
                {"source_id": source, "target_id": target, "fit": fit.to_dict()}
                for (source, target), fit in self.links.items()
            ],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Raises InvalidRequest for what `to_dict` has not written."""
        model = cls()
        try:
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}")
            model.prefill.load(state["prefill"])
            model.decode.load(state["decode"])
            for link in state["links"]:
                model.links[link["source_id"], link["target_id"]] = OnlineFit(_LINK_SCALE).load(link["fit"])
        except (KeyError, TypeError, ValueError) as err:
            raise InvalidRequest(
                f"this is no saved cost model of format {FORMAT}: {err!r}; delete it, and it is learned again"
            ) from err
        return model


_PREFILL_SCALE = (1.0, 1e3, 1e6)
_DECODE_SCALE = (1.0, 1e4, 10.0)
_LINK_SCALE = (1.0, 1e8)


def _prefill_features(chunks: Iterable[tuple[int, int]]) -> tuple[float, float, float]:
    tokens = squares = 0
    for start, end in chunks:
        tokens += end - start
        squares += end * end - start * start
    return 1.0, float(tokens), float(squares)


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
