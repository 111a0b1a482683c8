"""The cheapest shape that is enough, with few questions: more workers of a kind are never worse, nor cheaper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """No prefill workers: the decode workers compute the prompts."""

    prefill: int
    decode: int

    @property
    def workers(self) -> int:
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


Enough = Callable[[Shape], bool]
Cost = Callable[[Shape], float]


def cheapest(enough: Enough, cost: Cost, max_workers: int) -> Shape | None:
    """None: no shape of so many workers is. `cost` grows with each kind of worker.

    An upper bound first, from equal numbers of both kinds and from decode workers alone. Then along the edge of what is
    enough, by saddleback search: in a grid that grows both ways each question strikes off a row or a column. What costs
    no less than the best so far is not asked for.
    """
    best: Shape | None = None

    def better(shape: Shape) -> bool:
        return shape.workers <= max_workers and (best is None or cost(shape) < cost(best))

    for bound in (
        _first(lambda n: enough(Shape(n, n)), max_workers // 2, lambda n: Shape(n, n)),
        _first(lambda n: enough(Shape(0, n)), max_workers, lambda n: Shape(0, n)),
    ):
        if bound is not None and better(bound):
            best = bound
    prefill, decode = max_workers - 1, 1
    while prefill >= 1 and decode < max_workers:
        shape = Shape(prefill, decode)
        if not better(shape):
            prefill -= 1  # more decode workers would be dearer still, and fewer were not enough
        elif enough(shape):
            best = shape
            prefill -= 1
        else:
            decode += 1  # fewer prefill workers would not be enough either
    return best


def _first(enough: Callable[[int], bool], limit: int, shape: Callable[[int], Shape]) -> Shape | None:
    """The smallest number that is enough, by doubling and halving."""
    low, high = 0, 1
    while high <= limit and not enough(high):
        low, high = high, 2 * high
    if high > limit:
        if low >= limit or not enough(limit):
            return None
        high = limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return shape(high)
