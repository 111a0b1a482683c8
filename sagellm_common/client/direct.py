"""Generations that a router plans and workers stream straight to this process.

    plan ──► route ──► the decode worker: tokens ──► the end, told to the router
      ▲                    │
      └── again, with what failed and what there is already; of another router, where this one is lost

A router that is lost while tokens come is not missed. A decode worker that this machine cannot reach has its tokens
relayed by the router.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from sagellm_common.client.routers import Routers
from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    KvCorrupt,
    LeaseExpired,
    Overloaded,
    PeerLost,
    SageError,
)
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import FinishReason, GenerationOutput, GenerationRequest, KvSource, pack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, plan_pb2
from sagellm_common.rpc.inference_session import PlannedCall, RouterLost
from sagellm_common.rpc.progress import GenerationProgress
from sagellm_common.rpc.routes import decode_address, parse_route
from sagellm_common.rpc.session_client import to_ms
from sagellm_common.rpc.sessions import DecodeSession, DecodeStep
from sagellm_common.rpc.status import to_status
from sagellm_common.rpc.worker_sessions import WorkerSessions

log = logging.getLogger(__name__)

UNREACHABLE_S = 30.0
"""So long a worker that could not be reached is not tried again."""


class _HandedOver(Draining):
    """The decode worker leaves, and has ended the generation for another one to go on with."""

    def __init__(self, worker_id: str, source: KvSource | None) -> None:
        super().__init__(f"decode worker {worker_id} leaves and has handed the generation over")
        self.source = source


class _Unreachable(Exception):
    """The worker does not answer from here; the router may well reach it."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """How an attempt ended; `worker` was at fault, None: nobody is known to be."""

    attempt: int
    error: SageError
    worker: inference_pb2.WorkerAddress | None


class _Generation:
    """One generation on its way: what is asked of routers for it, and what is told of it."""

    def __init__(self, request: GenerationRequest, timeout_s: float, clock: Clock) -> None:
        self.request = request
        self.handed_over: KvSource | None = None
        """Where its KV waits for the next decode worker."""
        self.events: list[tuple[str, float, float, str]] = []
        self.progress = GenerationProgress(request, clock, lambda *event: self.events.append(event))
        self._clock = clock
        self._ends_s = clock.now() + timeout_s
        self._message = codec.encode_generation_request(request, 0, current_carrier())

    def left_s(self) -> float:
        """Raises DeadlineExceeded."""
        left_s = self._ends_s - self._clock.now()
        if left_s <= 0:
            raise DeadlineExceeded(f"generation {self.request.request_id} was not done until its deadline")
        return left_s

    def message(self) -> inference_pb2.GenerateRequest:
        """The request, with the time that it still has."""
        self._message.timeout_ms = to_ms(self.left_s())
        return self._message

    def plan_request(self, failure: _Failure | None) -> inference_pb2.PlanRequest:
        asked = inference_pb2.PlanRequest(request=self.message())
        if failure is not None:
            asked.emitted_token_ids = pack_int32(self.progress.emitted)
            asked.failed_attempt = failure.attempt
            asked.failure.CopyFrom(to_status(failure.error))
            if failure.worker is not None:
                asked.failed_worker.CopyFrom(failure.worker)
            if self.handed_over is not None:
                asked.handed_over.CopyFrom(codec.encode_kv_source(self.handed_over))
        return asked

    def take(self, step: DecodeStep, route: inference_pb2.Route, asked_s: float) -> GenerationOutput | None:
        """What a step of the worker's makes of it. `asked_s`: when it was asked."""
        progress, prefilled = self.progress, step.prefilled
        if prefilled is None:
            moved = self.handed_over is not None
            if step.token_ids:
                self.handed_over = None
            return progress.stepped(route.decode.worker_id, step, route.decode_block_tokens, moved=moved)
        reserved_s = asked_s + prefilled.reserve_ms / 1e3
        progress.record("reserve", asked_s, prefilled.reserve_ms, route.decode.worker_id)
        if prefilled.pulling_ahead_blocks:
            progress.pulling_ahead(route.decode.worker_id, route.prefill.worker_id, prefilled.pulling_ahead_blocks)
        progress.record("prefill", reserved_s, prefilled.prefill_ms, route.prefill.worker_id)
        outcome = replace(
            prefilled.outcome, token_ids=step.token_ids, logprobs=step.logprobs, finish_reason=step.finish_reason
        )
        return progress.prefilled(route.prefill.worker_id, outcome)

    def end_report(self, output: GenerationOutput) -> inference_pb2.ProgressReport:
        events = [
            plan_pb2.PlanEvent(stage=stage, at_ms=at_ms, duration_ms=duration_ms, detail=detail)
            for stage, at_ms, duration_ms, detail in self.events
        ]
        return inference_pb2.ProgressReport(
            finish_reason=codec.encode_finish_reason(output.finish_reason),
            summary=codec.encode_summary(output.summary) if output.summary is not None else None,
            events=events,
        )


class DirectGenerations:
    """The caller closes `decodes`, and `routers`."""

    def __init__(self, routers: Routers, decodes: WorkerSessions[DecodeSession], clock: Clock) -> None:
        self._routers = routers
        self._decodes = decodes
        self._clock = clock
        self._unreachable: dict[tuple[str, str], float] = {}
        """(worker_id, incarnation) → until when its tokens are relayed."""

    async def generate(self, request: GenerationRequest, timeout_s: float) -> AsyncGenerator[GenerationOutput, None]:
        """Outputs as they come; the last has finish_reason. Iterate under `aclosing`: leaving early cancels the
        generation everywhere.

        Raises what router and workers answer, PeerLost where no router can be reached, DeadlineExceeded.
        """
        generation, failure = _Generation(_complete(request), timeout_s, self._clock), None
        lost = 0
        while True:
            router = self._routers.current
            try:
                async with router.session.planning(generation.plan_request(failure), generation.left_s()) as call:
                    while True:
                        result = await call.answer()
                        if result.HasField("output"):  # it relays
                            call.ended = result.output.finish_reason != 0
                            yield codec.decode_output(result.output)
                            if call.ended:
                                return
                            continue
                        failure = None
                        async with aclosing(self._attempt(call, result.route, generation)) as outputs:
                            try:
                                async for output in outputs:
                                    yield output
                            except SageError as error:
                                failure = self._failed(error, result.route, generation)
                        if failure is None:
                            return
                        if generation.progress.complete:  # only the word that it is finished got lost
                            output = generation.progress.finish(FinishReason.LENGTH)
                            call.end(generation.end_report(output))
                            yield output
                            return
                        call.again(generation.plan_request(failure))
            except _Unreachable:
                break
            except (RouterLost, Draining) as err:
                why = err.error if isinstance(err, RouterLost) else err
                lost += 1
                if isinstance(why, DeadlineExceeded) or lost >= len(self._routers):
                    raise why from None
                self._routers.lost(router)
        relayed = router.session.generate(generation.request, timeout_s=generation.left_s())
        async with aclosing(relayed) as outputs:
            async for output in outputs:
                yield output

    async def _attempt(
        self, call: PlannedCall, signed: inference_pb2.SignedRoute, generation: _Generation
    ) -> AsyncGenerator[GenerationOutput, None]:
        """One route's tokens. Raises what the worker answers, PeerLost; _Unreachable before the first token."""
        route, progress = parse_route(signed), generation.progress
        worker = decode_address(route.decode, "route.decode")
        key = worker.worker_id, worker.incarnation
        if not progress.emitted and self._unreachable.get(key, 0.0) > self._clock.now():
            raise _Unreachable
        progress.planned(route.attempt)
        session, asked_s, ended = self._decodes.get(worker), self._clock.now(), False

        def stop(error: SageError) -> None:
            session.abandon(progress.request.request_id, route.attempt, error)

        sent = session.routed(
            generation.message(),
            signed,
            route.attempt,
            progress.emitted,
            generation.handed_over if not route.HasField("prefill") else None,
            timeout_s=generation.left_s(),
        )
        try:
            async with sent as replies:
                call.listen(stop)
                while not ended:
                    step = session.step_of(await replies.get())
                    if step.handed_over is not None:
                        ended = True
                        raise _HandedOver(worker.worker_id, step.handed_over.source)
                    output = generation.take(step, route, asked_s)
                    ended = step.finish_reason is not None
                    if output is None:
                        continue
                    if ended:
                        progress.decoded(worker.worker_id)
                        call.end(generation.end_report(output))
                    yield output
                    if step.prefilled is not None and not ended:
                        call.report(_first_token(step))
        except Cancelled as err:
            ended = True
            if err.metadata.get("by") != "client":  # the worker stops
                raise Draining(f"decode worker {worker.worker_id} ended the request; it is stopping") from None
            output = progress.finish(FinishReason.CANCELLED)
            call.end(generation.end_report(output))
            yield output
        except PeerLost as err:
            if not session.heard and not progress.emitted:
                log.warning("decode worker %s cannot be reached, its tokens are relayed: %s", key, err.message)
                self._unreachable[key] = self._clock.now() + UNREACHABLE_S
                raise _Unreachable from err
            raise
        finally:
            call.listen(None)
            if not ended:
                stop(Cancelled("its client has left"))

    def _failed(self, error: SageError, signed: inference_pb2.SignedRoute, generation: _Generation) -> _Failure:
        route = parse_route(signed)
        stage = error.metadata.get("stage", "decode")
        worker = _at_fault(error, stage, route, generation.progress)
        name = worker.worker_id if worker is not None else ""
        detail = f"{name}: {error.reason} {error.message}".removeprefix(": ")
        if isinstance(error, _HandedOver):
            stage, generation.handed_over = "hand over", error.source
            generation.progress.moves += 1
        elif not isinstance(error, Overloaded | Draining):  # the others have not pulled it yet
            generation.handed_over = None
        generation.progress.record(stage, self._clock.now(), 0.0, detail)
        return _Failure(route.attempt, error, worker)


def _at_fault(
    error: SageError, stage: str, route: inference_pb2.Route, progress: GenerationProgress
) -> inference_pb2.WorkerAddress | None:
    """The worker whose call failed; of a pull that broke, the one that was pulled from."""
    if not route.HasField("prefill"):
        return route.decode
    pulling = stage == "decode" and progress.transferring
    own = error.metadata.get("worker_id") == route.decode.worker_id
    if stage == "prefill" or (pulling and isinstance(error, PeerLost | LeaseExpired | KvCorrupt) and not own):
        return route.prefill
    return route.decode


def _first_token(step: DecodeStep) -> inference_pb2.ProgressReport:
    assert step.prefilled is not None
    outcome = step.prefilled.outcome
    return inference_pb2.ProgressReport(
        first_token=inference_pb2.FirstToken(
            cached_tokens=outcome.cached_tokens, compute_ms=outcome.compute_ms, engine_ms=outcome.engine_ms
        )
    )


def _complete(request: GenerationRequest) -> GenerationRequest:
    """With an id; and seeded, so that another worker can go on where a lost one stopped."""
    if not request.request_id:
        request = replace(request, request_id=uuid.uuid4().hex)
    if not request.sampling.greedy and request.sampling.seed is None:
        request = replace(request, sampling=replace(request.sampling, seed=random.getrandbits(63)))
    return request
