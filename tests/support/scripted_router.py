"""A router that says what the test wrote down: the real InferenceService, a TopologyService, and no workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sagellm_common.core.errors import InvalidRequest, SageError
from sagellm_common.core.types import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    GenerationSummary,
    KvLayout,
    KvStats,
    ModelInfo,
    TokenLogprob,
    WorkerRecord,
    WorkerRole,
)
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    plan_pb2,
    topology_pb2,
    topology_pb2_grpc,
    worker_pb2,
)
from sagellm_common.rpc.server import GrpcServer, Registrar
from services.router.explain import ExplainLog
from services.router.servicer import InferenceServicer

VOCAB_SIZE = 320
WAIT_S = 10.0
"""Deadline of everything a test waits for."""


def model_info(
    path: str = "", name: str = "tiny", context_length_tokens: int = 256, vocab_size: int = VOCAB_SIZE
) -> ModelInfo:
    layout = KvLayout("fingerprint", "float32", 16, 2, 2, 16, block_bytes=16384)
    return ModelInfo(name, path, context_length_tokens, vocab_size, layout)


def worker_record(model: ModelInfo) -> WorkerRecord:
    return WorkerRecord("prefill-0", WorkerRole.PREFILL, "127.0.0.1:1", "127.0.0.1:2", "inc", 1, model)


@dataclass
class Script:
    """What the router does. `reply` is what it generates, cut at max_new_tokens: a LENGTH finish if that cut it.

    It sends `tokens_per_message`, raises `error` after `error_after` tokens, and hangs after `hang_after`
    until `release`.
    """

    reply: Sequence[int] | Callable[[GenerationRequest], Sequence[int]] = ()
    tokens_per_message: int = 1
    error: SageError | None = None
    error_after: int = 0
    cancel_error: SageError | None = None
    hang_after: int | None = None
    models: list[ModelInfo] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.STOP


@dataclass
class ScriptedRouter:
    """Serves `script`, and keeps what came in."""

    script: Script
    address: str = ""
    requests: list[GenerationRequest] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Requests whose stream the client left before its end."""
    cancel_calls: list[str] = field(default_factory=list)
    num_list_models: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _released: bool = False
    _cancel_events: dict[str, asyncio.Event] = field(default_factory=dict)

    # ---- what tests wait for ----

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` of this router holds; TimeoutError after WAIT_S."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)

    async def release(self) -> None:
        """Generations that hang go on."""
        async with self._changed:
            self._released = True
            self._changed.notify_all()

    async def _note(self, where: list[Any], what: Any) -> None:
        where.append(what)
        async with self._changed:
            self._changed.notify_all()

    # ---- InferenceService ----

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerationOutput, None]:
        """In place of the router's pipeline."""
        self.metadata.append(request.trace_context)
        cancel = self._cancel_events[request.request_id] = asyncio.Event()
        await self._note(self.requests, request)
        finished = False
        try:
            async for output in self._outputs(request, cancel):
                yield output
            finished = True
        except SageError:
            finished = True
            raise
        finally:
            if not finished:
                await asyncio.shield(self._note(self.cancelled, request.request_id))

    async def _outputs(self, request: GenerationRequest, cancel: asyncio.Event) -> AsyncIterator[GenerationOutput]:
        script = self.script
        whole = list(script.reply(request) if callable(script.reply) else script.reply)
        tokens = whole[: request.sampling.max_new_tokens]
        reason = script.finish_reason if tokens == whole else FinishReason.LENGTH
        for index in range(0, max(len(tokens), 1), script.tokens_per_message):
            if script.error is not None and index >= script.error_after:
                raise script.error
            if script.hang_after is not None and index >= script.hang_after:
                async with self._changed:
                    await self._changed.wait_for(lambda: cancel.is_set() or self._released)
            if cancel.is_set():
                yield GenerationOutput(
                    request.request_id, index, (), (), FinishReason.CANCELLED, _summary(request, index)
                )
                return
            piece = tuple(tokens[index : index + script.tokens_per_message])
            last = index + len(piece) >= len(tokens)
            yield GenerationOutput(
                request.request_id,
                index,
                piece,
                tuple(_logprob(t, request.sampling.num_logprobs) for t in piece)
                if request.sampling.num_logprobs
                else (),
                reason if last else None,
                _summary(request, len(tokens)) if last else None,
            )

    async def CancelGeneration(self, message: inference_pb2.CancelGenerationRequest, context: Any) -> Any:
        if self.script.cancel_error is not None:
            raise self.script.cancel_error
        if event := self._cancel_events.get(message.request_id):
            event.set()
        await self._note(self.cancel_calls, message.request_id)
        return inference_pb2.CancelGenerationResponse()

    async def ListModels(self, message: inference_pb2.ListModelsRequest, context: Any) -> Any:
        self.num_list_models += 1
        return inference_pb2.ListModelsResponse(models=[codec.encode_model_info(m) for m in self.script.models])

    # ---- TopologyService ----

    async def Get(self, message: topology_pb2.GetTopologyRequest, context: Any) -> topology_pb2.TopologySnapshot:
        status = worker_pb2.WorkerStatus(
            record=codec.encode_worker_record(worker_record(model_info())),
            kv=codec.encode_kv_stats(KvStats(64, 60, 4, 0)),
            running_requests=1,
        )
        return topology_pb2.TopologySnapshot(revision=7, backend="embedded", connected=True, workers=[status])

    async def ExplainPlan(self, message: topology_pb2.ExplainPlanRequest, context: Any) -> Any:
        if message.request_id not in {r.request_id for r in self.requests}:
            raise InvalidRequest(f"no plan of request {message.request_id!r} is kept")
        node = plan_pb2.PlanNode(node_id=1, kind=plan_pb2.PLAN_NODE_KIND_PREFILL, worker_id="prefill-0", end_token=5)
        plan = plan_pb2.ExecutionPlan(
            plan_id="p", request_id=message.request_id, strategy="fifo", nodes=[node], reason="only one"
        )
        event = plan_pb2.PlanEvent(stage="admit", at_ms=0.5, duration_ms=0.25, detail="ok")
        return topology_pb2.ExplainPlanResponse(plan=plan, events=[event])


def _summary(request: GenerationRequest, completion_tokens: int) -> GenerationSummary:
    return GenerationSummary(
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=completion_tokens,
        cached_tokens=2,
        kv_bytes_transferred=4096,
        ttft_ms=1.23456,
        prefill_worker_id="prefill-0",
        decode_worker_id="decode-0",
    )


def _logprob(token_id: int, num_logprobs: int) -> TokenLogprob:
    """The token itself is the second best; the best are its neighbours."""
    best = tuple((token_id + i - 1) % VOCAB_SIZE for i in range(num_logprobs))
    return TokenLogprob(-0.5, best, tuple(-0.25 * (i + 1) for i in range(num_logprobs)))


@asynccontextmanager
async def scripted_router(script: Script, bind: str = "127.0.0.1:0") -> AsyncIterator[ScriptedRouter]:
    router = ScriptedRouter(script)
    inference = InferenceServicer(router, None, ExplainLog(), WAIT_S)  # type: ignore[arg-type]  # no workers are asked
    inference.CancelGeneration = router.CancelGeneration  # type: ignore[method-assign]
    inference.ListModels = router.ListModels  # type: ignore[method-assign]
    server = GrpcServer(
        bind,
        [
            Registrar(
                "sagellm.v1.InferenceService", inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference
            ),
            Registrar(
                "sagellm.v1.TopologyService", topology_pb2_grpc.add_TopologyServiceServicer_to_server, _Topology(router)
            ),
        ],
    )
    router.address = f"127.0.0.1:{await server.start()}"
    await server.set_serving(True)
    try:
        yield router
    finally:
        await server.stop(0)


class _Topology(topology_pb2_grpc.TopologyServiceServicer):
    """The rest of the service answers UNIMPLEMENTED."""

    def __init__(self, router: ScriptedRouter) -> None:
        self.Get = router.Get  # type: ignore[method-assign]
        self.ExplainPlan = router.ExplainPlan  # type: ignore[method-assign]
