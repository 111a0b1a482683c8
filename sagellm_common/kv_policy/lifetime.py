"""How long until a block is used again: learned online, by class of block and by how long it has lain idle."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BlockClass = tuple[int, ...]
"""What tells blocks apart, the most telling first. A class rarely seen leans on the one without its last part."""

OCTAVES = 32
PER_OCTAVE = 2
NUM_AGES = PER_OCTAVE * OCTAVES

_Floats = NDArray[np.float64]


def age_bin(age: int) -> int:
    """Ages double every PER_OCTAVE bins: 0, 1, 2, 3, 4–5, 6–7, 8–11, 12–15, …"""
    if age < 2:
        return age
    octave = age.bit_length()
    if octave > OCTAVES:
        return NUM_AGES - 1
    return 2 * octave - 2 + (age >> (octave - 2) & 1)


def _edges() -> _Floats:
    starts = [0, 1]
    for octave in range(2, OCTAVES + 2):
        starts += [1 << (octave - 1), 3 << (octave - 2)]
    return np.array(starts[: NUM_AGES + 1], dtype=float)


_EDGES = _edges()
_WIDTHS = np.diff(_EDGES)
_STARTS: list[float] = _EDGES.tolist()
_PER_WIDTH: list[float] = (1.0 / _WIDTHS).tolist()


RATIO_PRIOR = 20.0
"""Uses that are taken for granted, so that the first few blocks of a class do not settle how it compares."""
MAX_HAZARD = 0.9


class LifetimePredictor:
    """Counts how many blocks of a class were used again at which age, and how many lived to see it.

    Ages are in block accesses of the pool, so that a busy hour and a quiet one teach the same. The estimate of the
    chance of a use at an age (hazard) is the actuarial one: uses / blocks exposed, with `prior` blocks added that have
    the hazards of the class above, times the ratio of its uses to those that these foretell. Counts are halved each
    `memory` observations, so that a change of the workload is learned.
    """

    def __init__(self, prior: float = 100.0, memory: int = 1 << 18) -> None:
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
                name = block_class[:level]
                used[name] = used.get(name, 0.0) + hits
                ended[name] = ended.get(name, 0.0) + misses
        hazards: dict[BlockClass, _Floats] = {(): np.zeros(NUM_AGES)}
        for block_class in sorted(used, key=len):
            hits, misses = used[block_class], ended[block_class]
            # Those that end within a bin without a use saw half of it, on average.
            exposed = (hits + misses)[::-1].cumsum()[::-1] - misses / 2
            if not block_class:
                hazards[()] = hits / (exposed + 1.0)
                continue
            inherited = hazards[block_class[:-1]]
            ratio = (hits.sum() + RATIO_PRIOR) / (exposed @ inherited + RATIO_PRIOR)
            foretold = self._prior * np.minimum(ratio * inherited, MAX_HAZARD)
            hazards[block_class] = (hits + foretold) / (exposed + self._prior)
        values, ever = _values(np.array([hazards[block_class] for block_class in used]))
        self._values.update(zip(used, values.tolist(), strict=True))
        self._ever.update(zip(used, ever.tolist(), strict=True))

    def value(self, block_class: BlockClass, age: int) -> float:
        """Uses per access that a block held from this age on will earn, if given up at the best time."""
        values = self._values.get(block_class)
        if values is None:
            if not block_class:
                return 1.0 / (1 + age)  # nothing is known: the younger, the better
            return self.value(block_class[:-1], age)
        at = age_bin(age)
        way = min(1.0, (age - _STARTS[at]) * _PER_WIDTH[at])
        return values[at] + way * (values[at + 1] - values[at])


_NONE = (0.0,) * NUM_AGES


def _values(hazards: _Floats) -> tuple[_Floats, _Floats]:
    """Of classes' hazards (a row each), from each age on, the best of all ages to stop at: uses expected ÷ accesses for
    which the block is held (Gittins' index, as for multi-armed bandits); and the chance that a block is ever used.
    """
    rows = len(hazards)
    alive = np.concatenate([np.ones((rows, 1)), np.cumprod(1.0 - hazards, axis=1)], axis=1)
    uses = 1.0 - alive
    spans = _WIDTHS * (alive[:, :-1] + alive[:, 1:]) / 2
    held = np.concatenate([np.zeros((rows, 1)), np.cumsum(spans, axis=1)], axis=1)
    values = np.zeros((rows, NUM_AGES + 1))
    for at in range(NUM_AGES):
        earned, spent = uses[:, at + 1 :] - uses[:, at, None], held[:, at + 1 :] - held[:, at, None]
        values[:, at] = np.max(earned / np.maximum(spent, 1e-12), axis=1)
    values[:, -1] = values[:, -2]
    return values, uses[:, -1]
