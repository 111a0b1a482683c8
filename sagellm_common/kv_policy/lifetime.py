"""How long until a block is used again: learned online, by class of block and by how long it has lain idle."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BlockClass = tuple[int, ...]
"""What tells blocks apart, the most telling first. A class rarely seen leans on the one without its last part."""

NUM_AGES = 32
_EDGES = np.concatenate([[0.0], 2.0 ** np.arange(NUM_AGES)])
_WIDTHS = np.diff(_EDGES)

_Floats = NDArray[np.float64]


def age_bin(age: int) -> int:
    """Ages double from bin to bin: 0, 1, 2–3, 4–7, …"""
    return min(age.bit_length(), NUM_AGES - 1)


class LifetimePredictor:
    """Counts how many blocks of a class were used again at which age, and how many lived to see it.

    Ages are in block accesses of the pool, so that a busy hour and a quiet one teach the same. The estimate of the
    chance of a use at an age (hazard) is the actuarial one: uses / blocks exposed, with `prior` blocks of the class
    above added. Counts are halved each `memory` observations, so that a change of the workload is learned.
    """

    def __init__(self, prior: float = 20.0, memory: int = 1 << 18) -> None:
        self._prior = prior
        self._memory = memory
        self._observed = 0
        self._used: dict[BlockClass, list[float]] = {}
        self._lost: dict[BlockClass, list[float]] = {}
        self._values: dict[BlockClass, list[float]] = {}
        self._ever: dict[BlockClass, float] = {}
        self._errors = self._base_errors = self._judged = 0.0

    def observe(self, block_class: BlockClass, age: int, used: bool) -> None:
        """A block of this class was used at this age, or given up on."""
        if block_class not in self._used:
            self._used[block_class] = [0.0] * NUM_AGES
            self._lost[block_class] = [0.0] * NUM_AGES
        (self._used if used else self._lost)[block_class][age_bin(age)] += 1.0
        self._observed += 1
        expected = self._ever.get(block_class)
        if expected is not None:
            self._judged += 1
            self._errors += (used - expected) ** 2
            self._base_errors += (used - self._ever[()]) ** 2

    @property
    def skill(self) -> float:
        """1 − Brier score ÷ that of always saying the average: 1 knows it all, 0 knows no more than the average."""
        return 1.0 - self._errors / self._base_errors if self._base_errors else 0.0

    def refresh(self, idle: Iterable[tuple[BlockClass, int]]) -> None:
        """Learns from what was observed, and from blocks that lie idle still: (class, age so far) of each."""
        if self._observed > self._memory:
            self._observed //= 2
            for counts in (*self._used.values(), *self._lost.values()):
                counts[:] = [count / 2 for count in counts]
        waiting: dict[BlockClass, list[float]] = {}
        for block_class, age in idle:
            if block_class not in waiting:
                waiting[block_class] = [0.0] * NUM_AGES
            waiting[block_class][age_bin(age)] += 1.0
        used: dict[BlockClass, _Floats] = {}
        ended: dict[BlockClass, _Floats] = {}
        for block_class in {*self._used, *waiting}:
            hits = np.array(self._used.get(block_class, _NONE))
            misses = np.array(self._lost.get(block_class, _NONE)) + np.array(waiting.get(block_class, _NONE))
            for level in range(len(block_class) + 1):
                above = block_class[:level]
                used[above] = used.get(above, 0.0) + hits
                ended[above] = ended.get(above, 0.0) + misses
        hazards: dict[BlockClass, _Floats] = {(): np.zeros(NUM_AGES)}
        for block_class in sorted(used, key=len):
            hits, misses = used[block_class], ended[block_class]
            # Those that end within a bin without a use saw half of it, on average.
            exposed = (hits + misses)[::-1].cumsum()[::-1] - misses / 2
            prior = self._prior if block_class else 1.0
            hazard = (hits + prior * hazards[block_class[:-1]]) / (exposed + prior)
            hazards[block_class] = hazard
            self._values[block_class], self._ever[block_class] = _values(hazard)

    def value(self, block_class: BlockClass, age: int) -> float:
        """Uses per access that a block held from this age on will earn, if given up at the best time."""
        values = self._values.get(block_class)
        if values is None:
            if not block_class:
                return 1.0 / (1 + age)  # nothing is known: the younger, the better
            return self.value(block_class[:-1], age)
        return values[age_bin(age)]


_NONE = (0.0,) * NUM_AGES


def _values(hazard: _Floats) -> tuple[list[float], float]:
    """From each age on, the best of all ages to stop at: uses expected ÷ accesses for which the block is held (Gittins'
    index, as for multi-armed bandits); and the chance that a block is ever used.
    """
    alive = np.concatenate([[1.0], np.cumprod(1.0 - hazard)])
    uses = np.concatenate([[0.0], np.cumsum(alive[:-1] - alive[1:])])
    held = np.concatenate([[0.0], np.cumsum(_WIDTHS * (alive[:-1] + alive[1:]) / 2)])
    values = [
        float(np.max((uses[at + 1 :] - uses[at]) / np.maximum(held[at + 1 :] - held[at], 1e-12)))
        for at in range(NUM_AGES)
    ]
    return values, float(1.0 - alive[-1])
