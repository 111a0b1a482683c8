"""A simulated cluster whose workers come and go, as an autoscaler says once per interval.

A worker that is asked for serves after `startup_s` and is paid for from the moment it was asked for until it has
finished what it had when it was told to go; meanwhile it gets nothing new.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.sim.cluster import Pool, SimCluster
from bench.sim.workers import DecodeSim, PrefillSim

Worker = PrefillSim | DecodeSim


@dataclass(frozen=True, slots=True)
class Seen:
    """What an autoscaler is told: since the look before, and workers asked for and serving, by phase."""

    now_s: float
    requests: int
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int
    asked: dict[str, int]
    ready: dict[str, int]
    busy_s: dict[str, float]


Decide = Callable[[Seen], tuple[int, int]]
"""→ prefill and decode workers to have."""


class ScaledCluster(SimCluster):
    """`decide` is asked every `interval_s` until `until_s`. `gpu_seconds` are those paid for."""

    def __init__(
        self,
        *args: Any,
        decide: Decide,
        interval_s: float,
        startup_s: float,
        until_s: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._decide, self._interval_s, self._startup_s, self._until_s = decide, interval_s, startup_s, until_s
        self._names = itertools.count(1000)
        self._pools: dict[str, Pool[Any]] = {"prefill": self._prefill, "decode": self._decode}
        self._asked = {phase: len(pool.workers) for phase, pool in self._pools.items()}
        self._paid_from = {name: 0.0 for pool in self._pools.values() for name in pool.workers}
        self._starting: dict[str, set[str]] = {"prefill": set(), "decode": set()}
        self._leaving: list[Worker] = []
        self._counted = 0
        self._busy_before: dict[str, float] = {}
        """By worker, at the look before."""
        self.gpu_seconds = 0.0
        self.history: list[tuple[float, int, int]] = []
        """(seconds, prefill, decode workers asked for) at each look."""
        self.clock.at(interval_s, self._look)

    def settle(self, end_s: float) -> None:
        """Pays for everything that is still there, once the run is over."""
        for name in list(self._paid_from):
            self._pay(name, end_s)

    def _look(self) -> None:
        now_s = self.clock.now_s
        self._reap()
        jobs = self._outcome.jobs
        arrived = jobs[self._counted :]
        self._counted = len(jobs)
        known = [job for job in arrived if not job.rejected]
        busy = {worker.name: worker.busy_s for pool in self._pools.values() for worker in pool.workers.values()}
        seen = Seen(
            now_s,
            len(arrived),
            sum(job.request.prompt_tokens for job in known),
            sum(job.prefill_hit_tokens for job in known),
            sum(job.request.output_tokens for job in known),
            dict(self._asked),
            {phase: len(pool.workers) for phase, pool in self._pools.items()},
            {
                phase: sum(busy[name] - self._busy_before.get(name, 0.0) for name in pool.workers)
                for phase, pool in self._pools.items()
            },
        )
        self._busy_before = busy
        wanted = dict(zip(("prefill", "decode"), self._decide(seen), strict=True))
        for phase, count in wanted.items():
            self._scale(phase, count)
        self.history.append((now_s, wanted["prefill"], wanted["decode"]))
        if now_s + self._interval_s <= self._until_s:
            self.clock.at(now_s + self._interval_s, self._look)

    def _scale(self, phase: str, count: int) -> None:
        more = count - self._asked[phase]
        self._asked[phase] = count
        for _ in range(more):
            self._start_one(phase)
        for _ in range(-more):
            self._stop_one(phase)

    def _start_one(self, phase: str) -> None:
        name = f"{phase}-{next(self._names)}"
        self._paid_from[name] = self.clock.now_s
        self._starting[phase].add(name)

        def serve() -> None:
            if name not in self._starting[phase]:
                return  # it was given up while it started
            self._starting[phase].discard(name)
            made = self._new_prefill(name) if phase == "prefill" else self._new_decode(name)
            self._pools[phase].add(made)
            self._let_in()

        self.clock.at(self.clock.now_s + self._startup_s, serve)

    def _stop_one(self, phase: str) -> None:
        """One that still starts, else the one with the least to finish."""
        if self._starting[phase]:
            name = max(self._starting[phase], key=lambda one: int(one.rpartition("-")[2]))
            self._starting[phase].discard(name)
            self._pay(name, self.clock.now_s)
            return
        workers = self._pools[phase].workers
        name = min(workers, key=lambda one: (workers[one].outstanding, one))
        self._leaving.append(self._pools[phase].remove(name))
        self._index.invalidate(name)
        self._reap()

    def _reap(self) -> None:
        for worker in [worker for worker in self._leaving if not worker.outstanding]:
            self._leaving.remove(worker)
            self._pay(worker.name, self.clock.now_s)

    def _pay(self, name: str, until_s: float) -> None:
        self.gpu_seconds += until_s - self._paid_from.pop(name)
