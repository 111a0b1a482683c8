"""The life of a request (match → place → reserve → prefill → transfer → decode) on the virtual clock.

Placement strategies, plan builder and passes, PD separation, prefix index, eviction policies, engine order and cost
model are the production objects; engines, links and time are simulated. What the cost model knows it learned here, from
the simulated steps.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from bench.sim.clock import VirtualClock
from bench.sim.kv import SimKv
from bench.sim.network import Network
from bench.sim.profile import Profile
from bench.sim.ranking import Ranking
from bench.sim.traces import SimRequest
from bench.sim.workers import DecodeSim, Job, PrefillSim, step_seconds
from sagellm_common.core.types import WorkerRole
from sagellm_common.prefix_reuse.index import PrefixReuseIndex
from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.engine_policy import RankedPolicy, SequenceView
from sagellm_common.scheduler_ir.facts import Facts, WorkerFacts
from sagellm_common.scheduler_ir.fairness import service_tokens
from sagellm_common.scheduler_ir.ir_graph import IRRequest
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, PlanNodeKind
from sagellm_common.scheduler_ir.optimizer import IROptimizer
from sagellm_common.scheduler_ir.pd_separation import Mode, PDSeparator, Separation
from sagellm_common.scheduler_ir.strategies import Placement, RequestView, Strategy, WorkerView
from sagellm_common.scheduler_ir.waiting import Waiting, WaitingRoom

W = TypeVar("W", PrefillSim, DecodeSim)

LEARN_EVERY = 32
SHORTLIST = 8
"""Of more workers than this, a strategy sees those with the longest prefixes and the least load."""


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Outcome:
    jobs: list[Job] = field(default_factory=list)
    end_s: float = 0.0
    transferred_bytes: float = 0.0
    busy_s: float = 0.0
    gave_up: bool = False
    """More had missed their targets than may; the rest was not simulated."""


class Pool(Generic[W]):
    """The workers of one phase that take requests, and those that have left."""

    def __init__(self, load: Callable[[W], tuple[float, ...]]) -> None:
        self.workers: dict[str, W] = {}
        self._idle: Ranking[W] = Ranking((), load)
        self._left: list[W] = []

    def add(self, worker: W) -> None:
        self.workers[worker.name] = worker
        self._idle.add(worker)
        worker.on_load = self._idle.update

    def remove(self, name: str) -> W:
        """It finishes what it has."""
        worker = self.workers.pop(name)
        self._idle.remove(worker)
        self._left.append(worker)
        return worker

    @property
    def busy_s(self) -> float:
        return sum(worker.busy_s for worker in (*self.workers.values(), *self._left))

    def shortlist(self, matched: Mapping[str, int]) -> list[W]:
        """All, or of too many the idlest and those with the longest prefixes. `matched`: blocks by worker's name."""
        if len(self.workers) <= 2 * SHORTLIST:
            return list(self.workers.values())
        here = ((-blocks, name) for name, blocks in matched.items() if name in self.workers)
        holders = (self.workers[name] for _, name in heapq.nsmallest(SHORTLIST, here))
        return list(dict.fromkeys([*self._idle.first(SHORTLIST), *holders]))


class SimCluster:
    """`max_waiting` requests at most wait for memory on decode workers; who comes then is rejected."""

    def __init__(
        self,
        profile: Profile,
        num_prefill: int,
        num_decode: int,
        make: Callable[[CostModel], Strategy],
        slo: Slo,
        *,
        block_tokens: int = 512,
        eviction: str = "cost-aware",
        max_waiting: int = 10_000,
        costs: CostModel | None = None,
        max_misses: float = math.inf,
        seed: int = 0,
        disaggregate: Mode = "always",
        both: bool = False,
    ) -> None:
        """`costs` are what the router has learned before; it goes on learning in them. A run ends as soon as more than
        `max_misses` requests have missed a target: who searches the highest rate need not know by how much. `seed` is
        of the noise in the profile, if it has any. `disaggregate` is as router.disaggregate; with `both` the decode
        workers compute prompts for each other, too."""
        self.clock = VirtualClock()
        self.costs = costs or CostModel()
        self._strategy = make(self.costs)
        self._profile = profile
        self._slo = slo
        self._max_waiting = max_waiting
        self._misses_left = max_misses
        self._network = Network(self.clock, profile.link_bytes_per_s, profile.link_latency_s)
        self._index = PrefixReuseIndex(max_blocks=1 << 24)
        policy = RankedPolicy(order=self._strategy.order)
        in_order = self._strategy.order == "fifo"

        rng = random.Random(seed)

        def kv() -> SimKv:
            return SimKv(profile.kv_tokens // block_tokens, block_tokens, eviction)

        def new_prefill(name: str) -> PrefillSim:
            return PrefillSim(name, self.clock, profile, kv(), policy, self._learn_prefill, rng, in_order=in_order)

        self._new_prefill = new_prefill
        self._new_decode = lambda name: DecodeSim(name, self.clock, profile, kv(), policy)
        self._prefill = Pool[PrefillSim](lambda worker: (worker.queued_tokens, worker.assigned))
        self._decode = Pool[DecodeSim](lambda worker: (worker.context_tokens + worker.coming_tokens, worker.assigned))
        for i in range(num_prefill):
            self._prefill.add(new_prefill(f"prefill-{i}"))
        for i in range(num_decode):
            self._decode.add(self._new_decode(f"decode-{i}"))
        self._role = WorkerRole.BOTH if both else WorkerRole.DECODE
        self._separator = PDSeparator(disaggregate)
        self._optimizer = IROptimizer(self._separator)
        self._waiting = WaitingRoom(self._strategy.order, fair=self._strategy.fair)
        self._steps = 0
        self._outcome = Outcome()

    def run(self, requests: Sequence[SimRequest], progress: Callable[[], None] = lambda: None) -> Outcome:
        """All of them, to the end. `progress` is called for each that arrives."""
        arrivals = iter(requests)

        def arrive(request: SimRequest) -> None:
            progress()
            self._arrive(request)
            plan_next()

        def plan_next() -> None:
            if (request := next(arrivals, None)) is not None:
                self.clock.at(request.arrival_s + self._profile.overhead_s, lambda: arrive(request))

        plan_next()
        self.clock.run()
        self._outcome.end_s = self.clock.now_s
        self._outcome.transferred_bytes = self._network.bytes
        self._outcome.busy_s = self._prefill.busy_s + self._decode.busy_s
        return self._outcome

    # ---- one request ----

    def _arrive(self, request: SimRequest) -> None:
        number = len(self._outcome.jobs)
        deadline_s = request.arrival_s + self._slo.ttft_s
        view = SequenceView(str(number), number, request.priority, deadline_s, arrived_s=request.arrival_s)
        job = Job(request, view)
        self._outcome.jobs.append(job)
        if request.prompt_tokens + request.output_tokens > self._profile.kv_tokens:
            job.rejected = "CONTEXT_TOO_LONG"
            self._missed()
        elif len(self._waiting) >= self._max_waiting:
            job.rejected = "QUEUE_FULL"
            self._missed()
        else:
            tokens = service_tokens(request.prompt_tokens, request.output_tokens)
            self._waiting.push(Waiting(view, request.tenant, tokens))
            self._let_in()

    def _let_in(self) -> None:
        while (first := self._waiting.peek(self.clock.now_s)) is not None:
            if not self._start(self._outcome.jobs[first.view.arrival]):
                break
            self._waiting.pop(self.clock.now_s)

    def _start(self, job: Job) -> bool:
        """Places it and takes memory where it decodes; False when there is none.

        The router asks another decode worker where one has no room; here that is known at once.
        """
        request, now_s = job.request, self.clock.now_s
        tokens = request.prompt_tokens + request.output_tokens
        depths = self._index.lookup(_hashes(request.blocks)) if request.blocks else {}
        matched = {worker: max(by_tier) for worker, by_tier in depths.items()}
        shown = self._decode.shortlist(matched)
        with_room = [worker for worker in shown if worker.kv.has_room(tokens)]
        if not with_room:
            return False
        view = RequestView(
            job.view.request_id,
            request.prompt_tokens,
            request.priority,
            waited_s=now_s - request.arrival_s,
            ttft_target_s=self._slo.ttft_s,
            tpot_target_s=self._slo.tpot_s,
        )
        placement = self._strategy.place(view, self._views(with_room, matched))
        decode = self._decode.workers[placement.decode_worker_id]
        blocks = decode.kv.blocks_of(tokens)
        job.decode_worker, job.reserved_blocks = decode.name, blocks
        job.decode_hit_tokens = decode.kv.hit_tokens(request.blocks, request.prompt_tokens)
        self._evicted(decode.name, decode.kv.take(blocks))
        decode.outstanding += 1
        decode.assigned += 1
        decode.on_load(decode)
        job.late = placement.late
        decode.expect(job, 1)
        plan, separation = self._plan(view, placement, request, matched)
        job.separation, job.planned_s = separation, now_s
        compute = plan.node(PlanNodeKind.PREFILL)
        assert compute is not None, "there is always something to compute"
        if plan.prefill_worker_id is None:
            self._prefill_locally(job, decode, compute.chunk_tokens)
            return True
        prefill = self._worker(plan.prefill_worker_id)
        job.prefill_worker = prefill.name
        job.prefill_hit_tokens = job.computed_tokens = prefill.kv.hit_tokens(request.blocks, request.prompt_tokens)
        self._expect(job)
        if isinstance(prefill, DecodeSim):
            self._learn_local(job)
            prefill.outstanding += 1
            prefill.assigned += 1

            def done() -> None:
                prefill.outstanding -= 1
                self._prefilled(job, prefill, decode, job.view.needed_s)

            prefill.compute(job, compute.chunk_tokens, done)
        else:
            prefill.submit(job, lambda step_s: self._prefilled(job, prefill, decode, step_s))
        return True

    def _worker(self, name: str) -> PrefillSim | DecodeSim:
        return self._prefill.workers.get(name) or self._decode.workers[name]

    def _plan(
        self, view: RequestView, placement: Placement, request: SimRequest, matched: dict[str, int]
    ) -> tuple[ExecutionPlan, Separation | None]:
        named = filter(None, (placement.decode_worker_id, placement.prefill_worker_id))
        workers = {name: self._worker(name) for name in named}
        facts = Facts(
            {name: _facts(worker) for name, worker in workers.items()},
            self.costs,
            kv_bytes_per_token=self._profile.kv_bytes_per_token,
            num_layers=self._profile.num_layers,
            tpot_target_s=self._slo.tpot_s,
        )
        cached = {name: matched.get(name, 0) * worker.kv.block_tokens for name, worker in workers.items()}
        asked = IRRequest(view, placement, request.output_tokens, cached)
        graph = self._optimizer.optimize(IRBuilder(facts.workers).build([asked]), facts)
        return graph.plans()[0], graph.separations[0]

    def _prefill_locally(self, job: Job, decode: DecodeSim, chunk_tokens: int) -> None:
        """The decode worker computes the prompt itself, between the steps of those that decode there."""
        job.prefill_hit_tokens = job.computed_tokens = job.decode_hit_tokens
        self._expect(job)
        self._learn_local(job)

        def done() -> None:
            self._decoding(job, decode, self.clock.now_s)

        decode.compute(job, chunk_tokens, done)

    def _learn_local(self, job: Job) -> None:
        """Of a prompt that is computed between decode steps."""
        a, b, c = self._profile.prefill
        start, end = job.computed_tokens, job.request.prompt_tokens
        self._learn_prefill([(start, end)], a + b * (end - start) + c * (end * end - start * start))

    def _expect(self, job: Job) -> None:
        needed_s = self.costs.prefill_s([(job.computed_tokens, job.request.prompt_tokens)]).seconds
        job.view = replace(job.view, needed_s=needed_s)

    def _prefilled(self, job: Job, prefill: PrefillSim | DecodeSim, decode: DecodeSim, step_s: float) -> None:
        request, now_s = job.request, self.clock.now_s
        job.first_token_s = now_s
        self._computed(prefill.name, prefill.kv, job)
        num_bytes = (request.prompt_tokens - job.decode_hit_tokens) * self._profile.kv_bytes_per_token
        # Layers are pulled while later ones are computed: the last one is left, and what the link did not manage.
        ahead = min(num_bytes * (1 - 1 / self._profile.num_layers), step_s * self._profile.link_bytes_per_s)

        def here() -> None:
            link = self.costs.links.get((prefill.name, decode.name))
            if self._sampled(link.samples if link else 0):
                self.costs.observe_transfer(prefill.name, decode.name, num_bytes - ahead, self.clock.now_s - now_s)
            self._decoding(job, decode, job.first_token_s)

        self._network.send(prefill.name, decode.name, num_bytes - ahead, here)

    def _decoding(self, job: Job, decode: DecodeSim, first_token_s: float) -> None:
        job.first_token_s = first_token_s
        if first_token_s - job.request.arrival_s > self._slo.ttft_s:
            self._missed()
        self._computed(decode.name, decode.kv, job)
        decode.expect(job, -1)
        if job.separation is not None and job.separation.chosen is not None:
            took_s = self.clock.now_s - job.planned_s + job.separation.chosen.step_s
            job.regret_s = job.separation.regret_s(took_s)
            self._separator.observe(job.separation, took_s)
            job.separation = None
        if self._sampled(self.costs.decode.samples):
            context = decode.context_tokens + job.request.prompt_tokens
            seconds = step_seconds(self._profile, decode.sequences + 1, context)
            self.costs.observe_decode(decode.sequences + 1, context, seconds)
        decode.submit(job, lambda: self._finished(job, decode))

    def _finished(self, job: Job, decode: DecodeSim) -> None:
        job.end_s = self.clock.now_s
        in_time = job.first_token_s - job.request.arrival_s <= self._slo.ttft_s
        if in_time and job.tpot_s > self._slo.tpot_s:
            self._missed()
        decode.outstanding -= 1
        decode.kv.give_back(job.reserved_blocks)
        self._let_in()

    def _missed(self) -> None:
        self._misses_left -= 1
        if self._misses_left < 0:
            self._outcome.gave_up = True
            self.clock.stop()

    # ---- what the router knows ----

    def _learn_prefill(self, chunks: list[tuple[int, int]], seconds: float) -> None:
        if self._sampled(self.costs.prefill.samples):
            self.costs.observe_prefill(chunks, seconds)

    def _sampled(self, known: int) -> bool:
        """All of the first samples, then one of LEARN_EVERY: simulated steps have no noise to average out."""
        self._steps += 1
        return known < LEARN_EVERY or self._steps % LEARN_EVERY == 0

    def _views(self, decode: list[DecodeSim], matched: dict[str, int]) -> list[WorkerView]:
        def matched_tokens(worker: PrefillSim | DecodeSim) -> int:
            return matched.get(worker.name, 0) * worker.kv.block_tokens

        prefillers = [
            WorkerView(
                *(w.name, WorkerRole.PREFILL, w.outstanding, w.assigned, matched_tokens(w)),
                queued_tokens=w.queued_tokens,
                queued_squares=w.queued_squares,
            )
            for w in self._prefill.shortlist(matched)
        ]
        decoders = [
            WorkerView(
                *(w.name, self._role, w.outstanding, w.assigned, matched_tokens(w)),
                queued_tokens=w.queued_tokens,
                queued_squares=w.queued_squares,
                sequences=w.sequences + w.coming,
                context_tokens=w.context_tokens + w.coming_tokens,
            )
            for w in decode
        ]
        return prefillers + decoders

    def _computed(self, name: str, kv: SimKv, job: Job) -> None:
        full = job.request.blocks[: job.request.prompt_tokens // kv.block_tokens]
        if full:
            gone = kv.cache(full)
            self._index.insert(name, _hashes(full))
            self._evicted(name, gone)

    def _evicted(self, name: str, blocks: Sequence[int]) -> None:
        if blocks:
            self._index.evict(name, _hashes(blocks))


def _facts(worker: PrefillSim | DecodeSim) -> WorkerFacts:
    kv, queued = worker.kv, (worker.queued_tokens, worker.queued_squares)
    if isinstance(worker, PrefillSim):
        return WorkerFacts(kv.block_tokens, 0, *queued)
    sequences, context_tokens = worker.sequences + worker.coming, worker.context_tokens + worker.coming_tokens
    return WorkerFacts(kv.block_tokens, 0, *queued, sequences, context_tokens)


def _hashes(blocks: Sequence[int]) -> bytes:
    """Packed, as the index takes them: a trace's numbers, spread over 128 bits."""
    numbers = np.array(blocks, np.int64).view(np.uint64)[:, None]
    return (numbers * _SPREAD).tobytes()


_SPREAD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
"""Odd, so that no two numbers become one."""
