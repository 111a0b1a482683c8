"""InferenceService: decode → call the pipeline → encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from sagellm_common.core.errors import DeadlineExceeded, InvalidRequest, SageError
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import GenerationOutput
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, inference_pb2_grpc, topology_pb2
from sagellm_common.rpc.interceptors import session_call
from sagellm_common.rpc.session_writer import SessionWriter
from sagellm_common.rpc.status import to_status
from services.router.codec import encode_explanation, encode_plan
from services.router.explain import ExplainLog
from services.router.observed import Generates
from services.router.routes import Routes
from services.router.strategies import Strategies
from services.router.workers import Workers

Context = grpc.aio.ServicerContext[Any, Any]
Writer = SessionWriter[inference_pb2.InferenceSessionResponse]

SERVICE = "sagellm.v1.InferenceService"

SLOW_READER_S = 5.0
"""A client that stops reading is dropped this long after the request's deadline at the latest."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`request_timeout_s` bounds clients that set no deadline. Without `routes` all tokens are relayed."""

    def __init__(
        self,
        pipeline: Generates,
        workers: Workers,
        explain: ExplainLog,
        request_timeout_s: float,
        routes: Routes | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._workers = workers
        self._explain = explain
        self._request_timeout_s = request_timeout_s
        self._routes = routes

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        asked = codec.decode_generation_request(request, current_carrier())
        try:
            async with asyncio.timeout(self._request_timeout_s + SLOW_READER_S):
                async with aclosing(self._pipeline.generate(asked, context.time_remaining())) as outputs:
                    async for output in outputs:
                        await context.write(self._encode(output))
        except TimeoutError:
            raise DeadlineExceeded("the client did not read its tokens until the deadline") from None

    async def Session(self, requests: AsyncIterator[inference_pb2.InferenceSessionRequest], context: Context) -> None:
        """Each generation runs in a task of the session: a stream that breaks cancels them all.

        None waits for the client to read; a client that reads nothing at all for a while loses its session.
        """
        writer = Writer.of(inference_pb2.InferenceSessionResponse, context)
        running: dict[int, asyncio.Task[None]] = {}
        async with writer.serving() as tasks:
            routes = self._routes.session(writer, tasks) if self._routes is not None else None

            def relay(call_id: int, request: inference_pb2.GenerateRequest) -> None:
                if call_id in running or (routes is not None and call_id in routes):
                    raise InvalidRequest(f"call_id {call_id} is in use; give each generation a new one")
                running[call_id] = task = tasks.create_task(self._generate(call_id, request, writer))
                task.add_done_callback(lambda _: running.pop(call_id))

            with contextlib.closing(routes) if routes is not None else contextlib.nullcontext():
                async for message in requests:
                    call_id = message.call_id
                    match message.WhichOneof("op"):
                        case "generate":
                            relay(call_id, message.generate)
                        case "plan" if routes is not None:
                            routes.plan(call_id, message.plan)
                        case "plan" if not message.plan.emitted_token_ids:
                            relay(call_id, message.plan.request)
                        case "plan":
                            writer.message.results.add(call_id=call_id, error=to_status(_begun_elsewhere()))
                        case "progress" if routes is not None:
                            routes.progress(call_id, message.progress)
                        case "leave" if call_id in running:
                            running[call_id].cancel()
                        case "leave" if routes is not None:
                            routes.leave(call_id)

    async def _generate(self, call_id: int, request: inference_pb2.GenerateRequest, writer: Writer) -> None:
        def refuse(err: SageError) -> None:
            writer.message.results.add(call_id=call_id, error=to_status(err))

        with session_call(SERVICE, "Generate", request.request_id, request.trace_context, refuse):
            if request.timeout_ms < 0:
                raise InvalidRequest(f"timeout_ms is {request.timeout_ms}, but must be at least 0")
            asked = codec.decode_generation_request(request, current_carrier())
            async with aclosing(self._pipeline.generate(asked, request.timeout_ms / 1000 or None)) as outputs:
                async for output in outputs:
                    writer.message.results.add(call_id=call_id, output=self._encode(output))
                    if output.index == 0:
                        writer.flush()  # before the pipeline asks for the second token

    def _encode(self, output: GenerationOutput) -> inference_pb2.GenerateResponse:
        explanation = self._explain.get(output.request_id) if output.summary else None
        return codec.encode_output(output, encode_plan(explanation.plan) if explanation and explanation.plan else None)

    async def CancelGeneration(
        self, request: inference_pb2.CancelGenerationRequest, context: Context
    ) -> inference_pb2.CancelGenerationResponse:
        """Idempotent: unknown and finished requests are fine."""
        self._pipeline.cancel(request.request_id)
        return inference_pb2.CancelGenerationResponse()

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        models = self._workers.models()
        return inference_pb2.ListModelsResponse(
            models=[codec.encode_model_info(models[name]) for name in sorted(models)]
        )


def _begun_elsewhere() -> SageError:
    return InvalidRequest(
        "this router relays all tokens and cannot go on with a generation that another one began; set rpc.tokens alike "
        "on all of them",
        metadata={"field": "plan.emitted_token_ids"},
    )


async def explain_plan(log: ExplainLog, request_id: str) -> topology_pb2.ExplainPlanResponse:
    """Raises InvalidRequest for a request that is unknown or too long ago."""
    return encode_explanation(log.require(request_id))


def set_strategy(strategies: Strategies, request: topology_pb2.SetStrategyRequest) -> topology_pb2.SetStrategyResponse:
    """Raises InvalidRequest."""
    if request.strategy:
        strategies.use(request.strategy, request.service_class)
    return topology_pb2.SetStrategyResponse(
        classes=[
            topology_pb2.ClassStrategy(
                service_class=line.service_class,
                strategy=line.strategy,
                engine_policy=line.order,
                placed_requests=line.placed,
            )
            for line in strategies.in_force()
        ]
    )
