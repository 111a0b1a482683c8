"""The life of a request, one way, no back and forth. Start reading at `Pipeline.generate`.

admit → ( match → plan → reserve on decode, prefill → decode ) → release
           ▲                                            │
           └──────── again elsewhere, after what ◄──────┘ a worker failed, or hands
                     was emitted already                  over what runs: see `moves`
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from dataclasses import replace
from typing import TypeVar

from sagellm_common.comm_backend.handoff import attempt_of
from sagellm_common.core.clock import Clock
from sagellm_common.core.config import RouterConfig
from sagellm_common.core.errors import Cancelled, Draining, EngineFailed, NoWorker, PeerLost, SageError, UnknownModel
from sagellm_common.core.types import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    HandoffTicket,
    KvSource,
    ModelInfo,
    WorkerAddress,
)
from sagellm_common.core.validation import validate_request
from sagellm_common.prefix_reuse.hashing import packed_block_hashes, root_hash
from sagellm_common.rpc.renewal import renewed
from sagellm_common.rpc.sessions import DecodeStep, FirstToken, PrefillOutcome, TransferReport
from sagellm_common.scheduler_ir.executor_api import PlanProgress
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind
from services.router.admission import Admission, Slot
from services.router.costs import CostLearner
from services.router.executor import Attempt, GrpcExecutor
from services.router.explain import ExplainLog
from services.router.generation import Generation
from services.router.held import Ended, Held, PromptComputed
from services.router.lifetime import lifetime_s
from services.router.load import Sent
from services.router.moves import Move, Moved, Moves
from services.router.placing import Placer, sent_of
from services.router.retry import Retry, blames_source
from services.router.separations import Separations
from services.router.stages import Admitted, Deadline, Matched, Pinned, Prefilled, Routed
from services.router.strategies import ttft_target_s
from services.router.transfers import TransferPlanner
from services.router.workers import WorkerLink, Workers

log = logging.getLogger(__name__)

MOVING = PlanNodeKind.TRANSFER, PlanNodeKind.MIGRATE
COMPUTING = PlanNodeKind.LOOKUP, PlanNodeKind.FETCH, PlanNodeKind.PREFILL

T = TypeVar("T")


class Pipeline:
    def __init__(
        self,
        config: RouterConfig,
        workers: Workers,
        placer: Placer,
        explain: ExplainLog,
        clock: Clock,
        rng: random.Random,
        transfers: TransferPlanner,
        separations: Separations,
        learner: CostLearner | None = None,
        moves: Moves | None = None,
    ) -> None:
        """`transfers`, `separations` and `learner` hear what the workers took; `moves`, which must run, what decodes
        where."""
        self._config = config
        self._workers = workers
        self._placer = placer
        self._explain = explain
        self._clock = clock
        self._rng = rng
        self._transfers = transfers
        self._separations = separations
        self._learner = learner
        self._moves = moves or Moves(workers)
        self._executor = GrpcExecutor(self._carry_out)
        self._admission = Admission(
            config.max_queue,
            clock,
            max_running=config.max_running,
            order=placer.strategies.order,
            fair=placer.strategies.fair,
            lifetime=lambda tokens: lifetime_s(workers.links, learner.costs, tokens) if learner else None,
        )

    @property
    def in_flight(self) -> int:
        return len(self._admission)

    @property
    def waiting(self) -> int:
        """Of those in flight, for their turn."""
        return self._admission.waiting

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerationOutput, None]:
        """The tokens of one generation as they come; the last output has finish_reason and summary.

        Iterate under `aclosing`: leaving early cancels the request everywhere. Raises InvalidRequest, ContextTooLong,
        UnknownModel, QueueFull, NoWorker, DeadlineExceeded, and a worker's failure that outlived all attempts.
        """
        request = replace(request, request_id=request.request_id or uuid.uuid4().hex)
        request, deadline = self._of_class(request), self._deadline(timeout_s)
        with self._admit_slot(request) as slot:
            generation = Generation(request, self._clock, self._explain.begin(request.request_id))
            retry, move = Retry(self._config.max_attempts), None
            try:
                with generation.stage("admit"):
                    admitted = await self._admit(request, deadline, slot)
                if not self._admission.enter(slot):
                    with generation.stage("queue"):
                        await self._admission.turn(slot, deadline.budget_s())
                while True:
                    try:
                        async with aclosing(self._attempt(admitted, generation, retry, slot, move)) as outputs:
                            async for output in outputs:
                                yield output
                        return
                    except Moved as moved:
                        slot.calls.check()
                        move = moved.move
                    except SageError as error:
                        slot.calls.check()
                        move = None
                        await self._before_retry(error, admitted, generation, retry, slot)
            except (GeneratorExit, asyncio.CancelledError):  # its client is gone
                slot.calls.settle(by_client=True)
                raise
            except Cancelled:
                if not slot.calls.cancelled:
                    raise
                yield generation.finish(FinishReason.CANCELLED)
            finally:
                slot.emitted_tokens = len(generation.emitted)
                with generation.stage("release"):
                    slot.calls.settle()

    def cancel(self, request_id: str) -> bool:
        """Ends a request in flight: its stream closes with CANCELLED. False when there is none."""
        return self._admission.cancel(request_id)

    async def drain(self) -> None:
        """Turns new requests away with Draining; returns when none is in flight."""
        await self._admission.drain()

    async def _attempt(
        self, admitted: Admitted, generation: Generation, retry: Retry, slot: Slot, move: Move | None = None
    ) -> AsyncGenerator[GenerationOutput, None]:
        """From match to the last token, once. Where tokens were emitted before, it goes on after them.

        Raises Moved when it is to go on elsewhere.
        """
        if generation.complete:
            yield generation.finish(FinishReason.LENGTH)
            return
        generation.attempts += 1
        with generation.stage("match"):
            matched = self._match(admitted)
        with generation.stage("plan"):
            routed = await self._route(admitted, matched, generation, retry, slot, move)
        work = Attempt(admitted, routed, generation, slot, move)
        async with aclosing(self._executor.submit_plan(routed.plan, work)) as outputs:
            async for output in outputs:
                yield output

    async def _carry_out(self, work: Attempt, progress: PlanProgress) -> AsyncGenerator[GenerationOutput, None]:
        """Reserve, prefill, decode, as the plan's nodes say. Lookups and offloads are the workers' own calls: what they
        hold and lack by then they know better than a plan."""
        admitted, routed, generation, slot = work.admitted, work.routed, work.generation, work.slot
        move = work.move
        planned_s = generation.age_s
        with routed.decode.engaged(), sent_of(admitted, routed, len(generation.emitted)) as sent:
            source = generation.pinned
            if move is not None and move.target is not routed.decode:
                move.undo()  # it left, too
                move = None
            if move is None and routed.prefill is not None:
                progress.enter(*COMPUTING)
                prefilling = self._prefill(admitted, routed, routed.prefill, generation, slot, sent)
                async with aclosing(prefilling) as outputs:
                    async for output in outputs:
                        yield output
                        if routed.expected_s:
                            generation.compare(routed.expected_s, planned_s)
                        if output.finish_reason is not None:
                            return
                progress.done(*COMPUTING)
                source = generation.pinned
            elif move is None and source is not None:
                await self._reserve(admitted, routed, generation, slot)
            progress.enter(*MOVING, *([] if source else COMPUTING))
            async with aclosing(self._decode(admitted, routed, source, generation, slot, sent)) as outputs:
                async for output in outputs:
                    if progress.stage is not PlanNodeKind.DECODE:
                        progress.done(*MOVING, *COMPUTING)
                        progress.enter(PlanNodeKind.DECODE)
                    self._compare(routed, generation, planned_s)
                    yield output
            slot.calls.finished()

    def _of_class(self, request: GenerationRequest) -> GenerationRequest:
        """With its class's priority. Raises InvalidRequest for a class that is not there."""
        if not request.service_class:
            return request
        self._placer.strategies.check(request.service_class)
        priority = request.priority + self._config.classes[request.service_class].priority
        return replace(request, priority=max(-(2**31), min(2**31 - 1, priority)))

    def _admit_slot(self, request: GenerationRequest) -> AbstractContextManager[Slot]:
        """As `Admission.admit`."""
        self._go_by_strategies()
        return self._admission.admit(request, ttft_target_s(self._config, request.service_class))

    def _go_by_strategies(self) -> None:
        self._admission.go_by(self._placer.strategies.order, fair=self._placer.strategies.fair)

    # ---- the stages ----

    async def _admit(self, request: GenerationRequest, deadline: Deadline, slot: Slot) -> Admitted:
        model = await self._with_grace(lambda: self._model(request.model), self._config.worker_grace_s, deadline, slot)
        validate_request(request, model)
        if not request.sampling.greedy and request.sampling.seed is None:
            # Seeded, so that another worker can go on where a lost one stopped.
            request = replace(request, sampling=replace(request.sampling, seed=self._rng.getrandbits(63)))
        return Admitted(request, model, deadline)

    def _match(self, admitted: Admitted) -> Matched:
        """Hashes differ between layouts: each one's find the workers that have it."""
        request, cached_tokens, stored_tokens = admitted.request, dict[str, int](), 0
        for layout in self._workers.layouts(admitted.model):
            size = layout.block_size_tokens
            hashes = packed_block_hashes(request.prompt_token_ids, size, root_hash(layout, request.cache_salt))
            for worker_id, tokens in self._workers.matched(hashes, size).items():
                cached_tokens[worker_id] = max(cached_tokens.get(worker_id, 0), tokens)
            stored_tokens = max(stored_tokens, self._workers.stored(hashes, size))
        return Matched(cached_tokens, stored_tokens)

    async def _route(
        self,
        admitted: Admitted,
        matched: Matched,
        generation: Generation,
        retry: Retry,
        slot: Slot,
        move: Move | None,
    ) -> Routed:
        def try_once() -> Routed:
            links = retry.preferred(self._workers.usable(admitted.model))
            if move is not None and move.target in links:
                links = [move.target]
            return self._placer.place(admitted, matched, generation, links)

        # A request that lost its worker has work to lose: it waits for the restart. A fresh one is better told at once.
        grace_s = self._config.resume_grace_s if generation.attempts > 1 else self._config.worker_grace_s
        routed = await self._with_grace(try_once, grace_s, admitted.deadline, slot)
        generation.explanation.plan, generation.explanation.routed = routed.plan, routed
        return routed

    async def _reserve(self, admitted: Admitted, routed: Routed, generation: Generation, slot: Slot) -> HandoffTicket:
        timeout_s = admitted.deadline.budget_s()
        slot.calls.reserving(routed.decode, generation.attempts)
        with generation.stage("reserve", routed.decode):
            return await routed.decode.decode.reserve(
                admitted.request, generation.attempts, generation.emitted, timeout_s=timeout_s
            )

    async def _prefill(
        self,
        admitted: Admitted,
        routed: Routed,
        worker: WorkerLink,
        generation: Generation,
        slot: Slot,
        sent: Sent,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """The first token, or the end; then its KV is pinned there, and blocks reserved for it on the decode worker.

        Where that has room, as far as is known, both are asked at once: a refusal ends the prefill. Meanwhile the
        decode worker pulls what is computed, where the prefill worker says that it is worth it.
        """
        ticket = None
        if generation.rejections or not _has_room(routed):
            ticket = await self._reserve(admitted, routed, generation, slot)
        timeout_s = admitted.deadline.budget_s()
        slot.calls.prefilling(worker, generation.attempts)
        kinds = PlanNodeKind.TRANSFER, PlanNodeKind.PREFILL, PlanNodeKind.DECODE
        transfer, compute, generating = (routed.plan.node(kind) for kind in kinds)
        assert compute is not None, "a prefill worker has a prefill to do"
        overlap = transfer.overlap if transfer else None

        def pull_ahead(source: KvSource) -> None:
            generation.pulling_ahead(routed.decode.worker_id, source.worker_id, len(source.block_table))
            routed.decode.decode.pull_ahead(
                admitted.request.request_id,
                generation.attempts,
                source,
                timeout_s=timeout_s,
                priority=generating.priority if generating else 0,
                wire_dtype=transfer.wire_dtype if transfer else "",
            )

        with worker.engaged(), generation.stage("prefill", worker):
            asking = worker.prefill.asking(
                replace(admitted.request, priority=compute.priority),
                generation.attempts,
                ticket,
                announce=overlap is not False,
                token_first=True,
                receiver_cached_tokens=transfer.start_token if transfer else 0,
                timeout_s=timeout_s,
                overlap=overlap,
                segment_bytes=transfer.segment_bytes if transfer else 0,
                chunk_tokens=compute.chunk_tokens,
                first_token_within_s=self._first_token_within_s(admitted.request, generation),
                needed_s=self._learner.needed_s(compute) if self._learner else 0.0,
                peer=routed.peer,
            )
            async with asking as replies:
                if ticket is None:
                    ticket = await self._reserve(admitted, routed, generation, slot)
                with renewed(ticket, routed.decode.decode.renew):
                    while not isinstance(answer := worker.prefill.answer_of(await replies.get()), PrefillOutcome):
                        if isinstance(answer, FirstToken):
                            yield generation.take_first_token(worker, answer)
                            sent.prefilled()
                        else:
                            pull_ahead(answer)
            prefilled = Prefilled(answer, worker, generation.attempts)
        computed = len(admitted.request.prompt_token_ids) - answer.cached_tokens
        self._transfers.observe(worker.worker_id, computed, answer.compute_ms / 1e3)
        sent.prefilled()
        if self._learner:
            self._learner.prefilled(worker, len(admitted.request.prompt_token_ids), answer)
        if output := generation.take_prefill(prefilled):
            yield output

    def _first_token_within_s(self, request: GenerationRequest, generation: Generation) -> float:
        """Until it is late, where its strategy cares."""
        if not self._placer.strategies.by_deadline(request.service_class):
            return math.inf
        return ttft_target_s(self._config, request.service_class) - generation.age_s

    async def _decode(
        self,
        admitted: Admitted,
        routed: Routed,
        source: Pinned | None,
        generation: Generation,
        slot: Slot,
        sent: Sent,
    ) -> AsyncGenerator[GenerationOutput, None]:
        timeout_s = admitted.deadline.budget_s()
        slot.calls.decoding(routed.decode, generation.attempts)
        kinds = PlanNodeKind.DECODE, PlanNodeKind.TRANSFER, PlanNodeKind.PREFILL
        generating, transfer, compute = (routed.plan.node(kind) for kind in kinds)
        assert generating is not None, "every plan ends in decoding"
        transfer = transfer or routed.plan.node(PlanNodeKind.MIGRATE)
        with (
            generation.stage("decode", routed.decode),
            self._moves.decoding(routed.decode, admitted, generation, slot.calls) as decoding,
        ):
            steps = routed.decode.decode.decode(
                replace(admitted.request, priority=generating.priority),
                generation.attempts,
                generation.emitted,
                source.source if source else None,
                timeout_s=timeout_s,
                wire_dtype=transfer.wire_dtype if transfer else "",
                chunk_tokens=compute.chunk_tokens if compute and source is None else 0,
            )
            async with aclosing(steps):
                async for step in steps:
                    if step.token_ids:
                        sent.prefilled()  # by the decode worker itself, else it is done already
                    self._count(routed.decode, step, source, sent)
                    if step.handed_over is not None:
                        raise decoding.handed_over(step.handed_over)
                    if step.finish_reason is FinishReason.CANCELLED:
                        raise Cancelled(f"decode worker {routed.decode.worker_id} ended the request; it is stopping")
                    if output := generation.take_step(routed.decode, step):
                        yield output

    def _count(self, link: WorkerLink, step: DecodeStep, source: Pinned | None, sent: Sent) -> None:
        if step.token_ids:
            sent.step(len(step.token_ids))
        if self._learner is None:
            return
        if step.transfer is not None and source is not None:
            self._learner.transferred(source.worker.worker_id, link.worker_id, step.transfer)
        if step.token_ids:
            self._learner.stepped(link, sent, len(step.token_ids))

    def _compare(self, routed: Routed, generation: Generation, planned_s: float) -> None:
        """With its second token it decodes, and what the way it took has cost is known."""
        explanation, separation = generation.explanation, routed.separation
        if separation is None or separation.chosen is None or explanation.took_s is not None:
            return
        if len(generation.emitted) >= 2:
            explanation.took_s = generation.age_s - planned_s
            self._separations.took(generation.request.request_id, separation, explanation.took_s)

    # ---- for clients that go to the workers themselves, see `routes` ----

    def hold(self, request: GenerationRequest, timeout_s: float | None) -> Held:
        """A place among the requests in flight; the caller releases it. Raises QueueFull, Draining, InvalidRequest."""
        request, deadline = self._of_class(request), self._deadline(timeout_s)
        self._go_by_strategies()
        slot = self._admission.take(request, ttft_target_s(self._config, request.service_class))
        generation = Generation(request, self._clock, self._explain.begin(request.request_id))
        return Held(request, deadline, slot, generation, Retry(self._config.max_attempts))

    def release(self, held: Held, *, well: bool = False, by_client: bool = False) -> None:
        """Once: see `Held.release`."""
        held.release(well=well, by_client=by_client)
        self._admission.leave(held.slot)

    def may_go(self, held: Held) -> bool:
        """Whether it may go to the workers at once; else `plan_when_possible` waits for its turn."""
        return self._admission.enter(held.slot)

    def plan_now(self, held: Held) -> Routed:
        """The first attempt. Raises InvalidRequest, ContextTooLong, UnknownModel, and NoWorker, after which
        `plan_when_possible` goes on."""
        generation = held.generation
        generation.attempts += 1
        with generation.stage("admit"):
            model = self._model(held.request.model)
            validate_request(held.request, model)
            held.admitted = Admitted(held.request, model, held.deadline)
        return self._plan(held, held.admitted)

    async def plan_when_possible(self, held: Held) -> Routed:
        """Waits a little for workers. Raises as `plan_now`."""
        generation, slot = held.generation, held.slot
        if not slot.running:
            with generation.stage("queue"):
                await self._admission.turn(slot, held.deadline.budget_s())
        if held.admitted is None:
            with generation.stage("admit"):
                held.admitted = await self._admit(held.request, held.deadline, slot)
        admitted = held.admitted
        grace_s = self._config.resume_grace_s if generation.attempts > 1 else self._config.worker_grace_s
        return await self._with_grace(lambda: self._plan(held, admitted), grace_s, held.deadline, slot)

    async def before_replan(self, held: Held, error: SageError) -> None:
        """Gives back what the failed attempt counted for, and waits a little. Raises `error` when it was the last
        attempt."""
        held.end_attempt()
        if held.admitted is None:  # by another router
            held.admitted = await self._admit(held.request, held.deadline, held.slot)
        pinned = held.generation.pinned
        if isinstance(error, Draining) and pinned is not None and pinned.worker is held.generation.at_fault:
            return  # it was asked to: no failure, and what it holds is wanted
        await self._before_retry(error, held.admitted, held.generation, held.retry, held.slot)

    def pinned(self, source: KvSource) -> Pinned | None:
        """What a decode worker has handed over to who read its tokens; None: that worker is gone."""
        link = self._workers.find(source.worker_id, source.incarnation)
        return Pinned(source, link, attempt_of(source.epoch), moved=True) if link is not None else None

    def _plan(self, held: Held, admitted: Admitted) -> Routed:
        generation = held.generation
        with generation.stage("match"):
            matched = self._match(admitted)
        with generation.stage("plan"):
            links = held.retry.preferred(self._workers.usable(admitted.model))
            routed = self._placer.place(admitted, matched, generation, links)
        generation.explanation.plan, generation.explanation.routed = routed.plan, routed
        held.begin(admitted, routed, self._moves)
        return routed

    def needed_ms(self, routed: Routed) -> float:
        """What the planned prefill is expected to take; 0: not known, or there is none."""
        compute = routed.plan.node(PlanNodeKind.PREFILL)
        return self._learner.needed_s(compute) * 1e3 if self._learner and compute is not None else 0.0

    def first_token_within_ms(self, held: Held) -> float | None:
        """What is left until the first token is late; None: there is no target."""
        within_s = self._first_token_within_s(held.request, held.generation)
        return None if math.isinf(within_s) else within_s * 1e3

    def worker(self, named: WorkerAddress) -> WorkerLink | None:
        return self._workers.find(named.worker_id, named.incarnation)

    def hear_first_token(self, held: Held, told: PromptComputed) -> None:
        routed = held.routed
        if routed is None or routed.prefill is None or held.sent is None:
            return
        held.prefilled()
        num_tokens = len(held.request.prompt_token_ids)
        self._transfers.observe(routed.prefill.worker_id, num_tokens - told.cached_tokens, told.compute_ms / 1e3)
        if routed.expected_s:
            held.generation.compare(routed.expected_s, held.planned_s)
        if self._learner:
            self._learner.prefilled(routed.prefill, num_tokens, told)

    def hear_end(self, held: Held, told: Ended, *, well: bool) -> None:
        """Gives back what it counts for."""
        routed, held.slot.emitted_tokens = held.routed, told.completion_tokens
        if self._learner and routed is not None and held.sent is not None:
            if routed.prefill is not None:
                transfer = TransferReport(told.kv_bytes_transferred, told.transfer_ms, 0, 0, "")
                self._learner.transferred(routed.prefill.worker_id, routed.decode.worker_id, transfer)
            self._learner.decoded(routed.decode, held.sent, told.completion_tokens, told.tpot_ms / 1e3)
        self.release(held, well=well)

    # ---- when a worker fails, or is not there ----

    async def _before_retry(
        self, error: SageError, admitted: Admitted, generation: Generation, retry: Retry, slot: Slot
    ) -> None:
        """Gives back what the failed attempt held and waits a little. Raises the error when it was the last attempt.

        An attempt whose KV still waits to be pulled is kept for the next attempt, unless it is the culprit. It waits no
        more where the engine failed: the pull comes before.
        """
        at_fault, pinned = generation.at_fault, generation.pinned
        if pinned and at_fault and blames_source(error, at_fault):
            at_fault = pinned.worker
        engine_failed = isinstance(error, EngineFailed)
        if pinned and (at_fault is pinned.worker or not pinned.worker.reachable or engine_failed):
            generation.unpin()
            pinned = None
        slot.calls.settle(keep=(pinned.worker, pinned.attempt) if pinned else None)
        if isinstance(error, PeerLost | EngineFailed) and at_fault:
            self._workers.suspect(at_fault)
        delay_s = retry.delay_after(error, at_fault)
        generation.rejections = retry.rejections
        if delay_s >= admitted.deadline.budget_s():
            raise error
        log.log(
            logging.DEBUG if error.code == "RESOURCE_EXHAUSTED" else logging.INFO,
            "request %s: attempt %d failed after %d tokens, trying again: %s",
            *(admitted.request.request_id, generation.attempts, len(generation.emitted), error.message),
        )
        await _wait_any(delay_s, slot.cancelled)
        slot.calls.check()

    async def _with_grace(self, try_once: Callable[[], T], grace_s: float, deadline: Deadline, slot: Slot) -> T:
        """`try_once`, again at each change of the workers while it raises NoWorker, for a short time: a restarted
        worker is not there yet."""
        give_up_s = self._clock.now() + min(grace_s, deadline.budget_s())
        while True:
            changed = self._workers.changed
            try:
                return try_once()
            except NoWorker:
                patience_s = give_up_s - self._clock.now()
                if patience_s <= 0:
                    raise
                await _wait_any(patience_s, changed, slot.cancelled)
                slot.calls.check()

    def _model(self, name: str) -> ModelInfo:
        """No name means the only model. Raises NoWorker when no worker was ever seen, UnknownModel."""
        models = self._workers.models()
        if not models:
            raise NoWorker("no worker has joined yet; start one or wait until it has", retry_after_s=1.0)
        if name in models:
            return models[name]
        if not name and len(models) == 1:
            return next(iter(models.values()))
        raise UnknownModel(
            f"model {name!r} is not served here; known: {', '.join(sorted(models))}", metadata={"model": name}
        )

    def _deadline(self, timeout_s: float | None) -> Deadline:
        limit_s = self._config.request_timeout_s
        return Deadline(self._clock, self._clock.now() + (limit_s if timeout_s is None else min(limit_s, timeout_s)))


def _has_room(routed: Routed) -> bool:
    """Whether the decode worker can reserve blocks for the prompt, as far as it has told."""
    status, model = routed.decode.status, routed.decode.record.model
    if status is None or status.kv is None or model is None:
        return False
    needed = -(-routed.seen.request.num_prompt_tokens // model.kv_layout.block_size_tokens)
    return status.kv.used_blocks + needed <= status.kv.total_blocks


async def _wait_any(timeout_s: float, *events: asyncio.Event) -> None:
    """Until one of the events is set, or the time is over."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
