"""What the steps of an engine took, as the engine itself saw them: what costs are learned from."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

KEPT_STEPS = 16
"""Of those between two looks at a worker the newest are enough to learn from; a router may look at a hundred."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step: chunks of prompts, or one token of each sequence; never both.

    Tokens [start, end) of `prompts` prompts were computed: `prompt_tokens` of them, `prompt_squares` the Σ (end² −
    start²). Or `sequences` got a token each and attended to `context_tokens` between them. `seconds` are from the end
    of the step before, or from when there was something to do again; for `cpu_seconds` of these the engine's thread
    was on a core, as far as that tells something: 0 on other devices than a CPU.
    """

    seconds: float
    prompts: int = 0
    prompt_tokens: int = 0
    prompt_squares: int = 0
    sequences: int = 0
    context_tokens: int = 0
    cpu_seconds: float = 0.0

    @classmethod
    def prefill(cls, chunks: Iterable[tuple[int, int]], seconds: float, cpu_seconds: float = 0.0) -> StepCost:
        found = list(chunks)
        tokens = sum(end - start for start, end in found)
        squares = sum(end * end - start * start for start, end in found)
        return cls(seconds, len(found), tokens, squares, cpu_seconds=cpu_seconds)


class StepLog:
    """The newest steps of one engine, numbered from 1. One thread adds, any may read."""

    def __init__(self, kept: int = KEPT_STEPS) -> None:
        self._steps: deque[StepCost] = deque(maxlen=kept)
        self._lock = Lock()
        self._last = 0

    def add(self, step: StepCost) -> None:
        with self._lock:
            self._steps.append(step)
            self._last += 1

    @property
    def last(self) -> int:
        return self._last

    def after(self, number: int) -> tuple[int, list[StepCost]]:
        """(number of the newest step, those after step `number` as far as they are kept)."""
        with self._lock:
            new = min(self._last - number, len(self._steps))
            return self._last, list(itertools.islice(self._steps, len(self._steps) - new, None))
