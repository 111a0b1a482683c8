"""Generations whose clients go to the workers themselves: planned here, told of here, on no token's way.

    plan ──► route ──► first_token ──► the end         one call of a client's session
      ▲                    │
      └─── again, with what failed

What a call counts for is held until its client says that it is over, or is gone: then the workers end it by themselves.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache, partial

from sagellm_common.core.errors import Cancelled, InvalidRequest, NoWorker, SageError
from sagellm_common.core.types import FinishReason, WorkerAddress, unpack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from sagellm_common.rpc.interceptors import session_call
from sagellm_common.rpc.routes import RouteSigner, encode_address
from sagellm_common.rpc.session_writer import SessionWriter
from sagellm_common.rpc.status import from_status, to_status
from services.router.codec import decode_events, encode_plan
from services.router.held import Held
from services.router.observed import RouterMetrics
from services.router.pipeline import Pipeline
from services.router.stages import Routed
from services.router.workers import WorkerLink

SERVICE = "sagellm.v1.InferenceService"

Writer = SessionWriter[inference_pb2.InferenceSessionResponse]


class Routes:
    """Gives routes out, signed."""

    def __init__(self, pipeline: Pipeline, signer: RouteSigner, metrics: RouterMetrics) -> None:
        self.pipeline = pipeline
        self.signer = signer
        self.metrics = metrics

    def session(self, writer: Writer, tasks: asyncio.TaskGroup) -> SessionRoutes:
        """For one client. Answers go to `writer`; what has to wait does so in `tasks`."""
        return SessionRoutes(self, writer, tasks)


class SessionRoutes:
    def __init__(self, routes: Routes, writer: Writer, tasks: asyncio.TaskGroup) -> None:
        self._pipeline = routes.pipeline
        self._signer = routes.signer
        self._metrics = routes.metrics
        self._writer = writer
        self._tasks = tasks
        self._held: dict[int, Held] = {}

    def __contains__(self, call_id: int) -> bool:
        return call_id in self._held

    def plan(self, call_id: int, message: inference_pb2.PlanRequest) -> None:
        """At once, where nothing has to be waited for."""
        request, refuse = message.request, partial(self._refuse, call_id)
        waits: Held | None = None
        with session_call(SERVICE, "Plan", request.request_id, request.trace_context, refuse):
            held = self._held.get(call_id)
            if held is None:
                held = self._hold(call_id, message)
            held.generation.emitted[:] = unpack_int32(message.emitted_token_ids).tolist()
            if message.HasField("failure"):
                held.generation.at_fault = self._at_fault(message, held)
                handed_over = codec.decode_kv_source(message.handed_over) if message.HasField("handed_over") else None
                held.generation.pin(self._pipeline.pinned(handed_over) if handed_over is not None else None)
                waits = held
            elif not self._pipeline.may_go(held):
                held.generation.attempts += 1
                waits = held
            else:
                try:
                    self._answer(call_id, message, held, self._pipeline.plan_now(held))
                except NoWorker:
                    waits = held
        if waits is not None:
            self._tasks.create_task(self._plan_later(call_id, message, waits))

    def progress(self, call_id: int, message: inference_pb2.ProgressReport) -> None:
        """Of a call that is not known (any more) it is of no interest."""
        held = self._held.get(call_id)
        if held is None:
            return
        if message.HasField("first_token"):
            self._pipeline.hear_first_token(held, message.first_token)
        if message.finish_reason or message.HasField("error"):
            del self._held[call_id]
            code = self._count(message)
            held.generation.explanation.told = partial(decode_events, message.events)
            self._pipeline.hear_end(held, message.summary, well=code == "OK")

    def leave(self, call_id: int) -> None:
        """The client is interested no more."""
        held = self._held.pop(call_id, None)
        if held is not None:
            self._metrics.counted("CANCELLED")
            self._pipeline.release(held, by_client=True)

    def close(self) -> None:
        """The client is gone, or its router is: workers notice the same."""
        for call_id in list(self._held):
            self.leave(call_id)

    # ---- parts of it ----

    def _hold(self, call_id: int, message: inference_pb2.PlanRequest) -> Held:
        if message.request.timeout_ms < 0:
            raise InvalidRequest(f"timeout_ms is {message.request.timeout_ms}, but must be at least 0")
        if not message.request.request_id:
            raise InvalidRequest("request_id is empty, but must be set", metadata={"field": "request_id"})
        request = codec.decode_generation_request(message.request)
        held = self._held[call_id] = self._pipeline.hold(request, message.request.timeout_ms / 1000 or None)
        held.generation.attempts = message.failed_attempt
        cancelled = Cancelled(f"request {request.request_id} was cancelled", metadata={"by": "client"})
        held.slot.on_cancel = partial(self._push, call_id, cancelled)
        return held

    async def _plan_later(self, call_id: int, message: inference_pb2.PlanRequest, held: Held) -> None:
        request = message.request
        with session_call(SERVICE, "Plan", request.request_id, request.trace_context, partial(self._refuse, call_id)):
            if message.HasField("failure"):
                await self._pipeline.before_replan(held, from_status(message.failure))
                held.generation.attempts += 1
            routed = await self._pipeline.plan_when_possible(held)
            if self._held.get(call_id) is held:
                self._answer(call_id, message, held, routed)
            else:  # its client has left meanwhile
                held.release()

    def _answer(self, call_id: int, message: inference_pb2.PlanRequest, held: Held, routed: Routed) -> None:
        decode_model = routed.decode.record.model
        route = inference_pb2.Route(
            request_id=held.request.request_id,
            attempt=held.generation.attempts,
            plan=encode_plan(routed.plan),
            decode=_address(routed.decode),
            prefill=_address(routed.prefill) if routed.prefill is not None else None,
            needed_ms=self._pipeline.needed_ms(routed),
            tenant=message.request.tenant,
            decode_block_tokens=decode_model.kv_layout.block_size_tokens if decode_model else 0,
            peer=encode_address(routed.peer.address) if routed.peer else None,
            first_token_within_ms=self._pipeline.first_token_within_ms(held),
        )
        signed = self._signer.sign(route, message.request.prompt_token_ids)
        self._writer.message.results.add(call_id=call_id, route=signed)

    def _at_fault(self, message: inference_pb2.PlanRequest, held: Held) -> WorkerLink | None:
        failed = message.failed_worker
        return self._pipeline.worker(WorkerAddress(failed.worker_id, failed.incarnation, failed.address))

    def _refuse(self, call_id: int, error: SageError) -> None:
        """Ends the call."""
        held = self._held.pop(call_id, None)
        if held is not None:
            self._pipeline.release(held)
        self._metrics.counted(error.reason)
        self._push(call_id, error)

    def _push(self, call_id: int, error: SageError) -> None:
        self._writer.message.results.add(call_id=call_id, error=to_status(error))

    def _count(self, message: inference_pb2.ProgressReport) -> str:
        """How it has ended, as metrics have it."""
        if message.HasField("error"):
            code = from_status(message.error).reason
        else:
            cancelled = codec.decode_finish_reason(message.finish_reason) is FinishReason.CANCELLED
            code = "CANCELLED" if cancelled else "OK"
            self._metrics.record(message.summary)
        self._metrics.counted(code)
        return code


def _address(link: WorkerLink) -> inference_pb2.WorkerAddress:
    record = link.record
    return _encoded(record.worker_id, record.incarnation, record.address)


@lru_cache(maxsize=4096)
def _encoded(worker_id: str, incarnation: str, address: str) -> inference_pb2.WorkerAddress:
    return encode_address(WorkerAddress(worker_id, incarnation, address))
