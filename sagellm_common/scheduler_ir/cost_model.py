"""What a step and a transfer cost in seconds, fitted online: one model for routing, autoscaling and simulation.

    prefill step    a + b·Σ tokens + c·Σ (end² − start²)    the last term is attention: token i reads the i before it
    decode step     a + b·Σ context + c·batch                one fit per regime of batch sizes
    transfer        latency + bytes / bandwidth              one fit per link
    switch          a                                        of a worker from one model to another

The forms are those of DistServe's simulator (Zhong et al., OSDI'24, appendix A), with a chunk of a prompt in place of
the whole. Coefficients are never negative: a step does not get cheaper by doing more.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.fitting import Estimate, OnlineFit
from sagellm_common.core.step_costs import StepCost

FORMAT = 2
REGIME_STARTS = (1, 2, 5, 17, 65)
"""Smallest batch of each decode regime: kernels tile the batch, and from some size on compute, not memory, limits."""


class DecodeFit:
    """One fit per regime of batch sizes; a regime that nobody has seen is answered by the nearest one that was."""

    def __init__(self, starts: Sequence[int] = REGIME_STARTS) -> None:
        self._starts = tuple(starts)
        self._fits = [OnlineFit(_DECODE_SCALE) for _ in starts]
        self._nearest: dict[int, OnlineFit] = {}
        """By number of sequences: of the regimes that were seen."""

    def observe(self, num_sequences: int, context_tokens: int, seconds: float) -> None:
        fit = self._fits[self._regime(num_sequences)]
        fit.observe((1.0, context_tokens, num_sequences), seconds)
        if fit.samples == 1:
            self._nearest.clear()

    def predict(self, num_sequences: int, context_tokens: int) -> Estimate:
        return self._fit(num_sequences).predict((1.0, context_tokens, num_sequences))

    def mean_s(self, num_sequences: int, context_tokens: int) -> float:
        return self._fit(num_sequences).seconds(1.0, context_tokens, num_sequences)

    def coefficients(self, num_sequences: int) -> tuple[float, ...]:
        """(of a step, of a token of context, of a sequence), in seconds."""
        return self._fit(num_sequences).coefficients

    @property
    def known(self) -> list[int]:
        """Smallest batches of the regimes that were seen."""
        return [start for start, fit in zip(self._starts, self._fits, strict=True) if fit.samples]

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
        self._nearest.clear()
        return self

    def _fit(self, num_sequences: int) -> OnlineFit:
        found = self._nearest.get(num_sequences)
        if found is None:
            wanted = self._regime(num_sequences)
            known = [i for i, fit in enumerate(self._fits) if fit.samples]
            nearest = min(known, key=lambda i: (abs(i - wanted), i), default=wanted)
            found = self._nearest[num_sequences] = self._fits[nearest]
        return found

    def _regime(self, num_sequences: int) -> int:
        return max(0, bisect.bisect_right(self._starts, num_sequences) - 1)


class CostModel:
    """Of one kind of worker serving one model. Not thread-safe; predictions take microseconds."""

    def __init__(self) -> None:
        self.prefill = OnlineFit(_PREFILL_SCALE)
        self.decode = DecodeFit()
        self.links: dict[tuple[str, str], OnlineFit] = {}
        """(source, target) worker ids → fit of (1, bytes)."""
        self.switch = OnlineFit((1.0,))

    # ---- what is measured ----

    def observe_step(self, step: StepCost) -> None:
        if step.prompts:
            self.prefill.observe((1.0, step.prompt_tokens, step.prompt_squares), step.seconds)
        else:
            self.decode.observe(step.sequences, step.context_tokens, step.seconds)

    def observe_prefill(self, chunks: Iterable[tuple[int, int]], seconds: float, steps: int = 1) -> None:
        """So many steps computed tokens [start, end) of each of these prompts."""
        _, tokens, squares = _prefill_features(chunks)
        self.prefill.observe((steps, tokens, squares), seconds)

    def observe_decode(self, num_sequences: int, context_tokens: int, seconds: float) -> None:
        """One step made one token for each sequence; `context_tokens` is the sum of what they attended to."""
        self.decode.observe(num_sequences, context_tokens, seconds)

    def observe_transfer(self, source_id: str, target_id: str, num_bytes: int, seconds: float) -> None:
        self.links.setdefault((source_id, target_id), OnlineFit(_LINK_SCALE)).observe((1.0, num_bytes), seconds)

    def observe_switch(self, seconds: float) -> None:
        """A worker has put one model in the place of another."""
        self.switch.observe((1.0,), seconds)

    # ---- what will be ----

    def prefill_s(self, chunks: Iterable[tuple[int, int]]) -> Estimate:
        return self.prefill.predict(_prefill_features(chunks))

    def step_s(self, step: StepCost) -> Estimate:
        """Of one that was measured: to compare."""
        if step.prompts:
            return self.prefill.predict((1.0, step.prompt_tokens, step.prompt_squares))
        return self.decode_s(step.sequences, step.context_tokens)

    def decode_s(self, num_sequences: int, context_tokens: int) -> Estimate:
        return self.decode.predict(num_sequences, context_tokens)

    def decode_mean_s(self, num_sequences: int, context_tokens: int) -> float:
        """`decode_s` without the uncertainty, in a fraction of its time: of each worker, for each request."""
        return self.decode.mean_s(num_sequences, context_tokens)

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

    def switch_s(self) -> Estimate:
        return self.switch.predict((1.0,))

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
            "switch": self.switch.to_dict(),
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
            if "switch" in state:  # older ones have none
                model.switch.load(state["switch"])
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
