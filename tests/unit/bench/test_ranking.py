"""Kept in order as sorting would have it."""

from __future__ import annotations

import random

from bench.sim.ranking import Ranking


class Worker:
    def __init__(self) -> None:
        self.load = 0


def test_the_least_loaded_come_first_whatever_changed_and_whoever_came_and_went() -> None:
    rng, workers = random.Random(5), [Worker() for _ in range(50)]
    ranking = Ranking(workers, lambda worker: (worker.load,))
    for _ in range(500):
        worker = rng.choice(workers)
        worker.load = rng.randrange(20)
        ranking.update(worker)
        if rng.random() < 0.2:
            workers.remove(worker)
            ranking.remove(worker)
            worker.load = -1
            ranking.update(worker)
            workers.append(Worker())
            ranking.add(workers[-1])
        assert ranking.first(7) == sorted(workers, key=lambda w: w.load)[:7]
