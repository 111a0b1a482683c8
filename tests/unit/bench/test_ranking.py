"""Kept in order as sorting would have it."""

from __future__ import annotations

import random

from bench.sim.ranking import Ranking


class Worker:
    def __init__(self) -> None:
        self.load = 0


def test_the_least_loaded_come_first_whatever_changed() -> None:
    rng, workers = random.Random(5), [Worker() for _ in range(50)]
    ranking = Ranking(workers, lambda worker: (worker.load,))
    for _ in range(500):
        worker = rng.choice(workers)
        worker.load = rng.randrange(20)
        ranking.update(worker)
        assert ranking.first(7) == sorted(workers, key=lambda w: w.load)[:7]
