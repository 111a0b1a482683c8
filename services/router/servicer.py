"""InferenceService: decode → call the pipeline → encode."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from sagellm_common.core.errors import DeadlineExceeded
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, inference_pb2_grpc, topology_pb2
from services.router.codec import encode_explanation, encode_plan
from services.router.explain import ExplainLog
from services.router.observed import Generates
from services.router.workers import Workers

Context = grpc.aio.ServicerContext[Any, Any]

SLOW_READER_S = 5.0
"""A client that stops reading is dropped this long after the request's deadline at the latest."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`request_timeout_s` bounds clients that set no deadline."""

    def __init__(self, pipeline: Generates, workers: Workers, explain: ExplainLog, request_timeout_s: float) -> None:
        self._pipeline = pipeline
        self._workers = workers
        self._explain = explain
        self._request_timeout_s = request_timeout_s

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        asked = codec.decode_generation_request(request, current_carrier())
        try:
            async with asyncio.timeout(self._request_timeout_s + SLOW_READER_S):
                async with aclosing(self._pipeline.generate(asked, context.time_remaining())) as outputs:
                    async for output in outputs:
                        explanation = self._explain.get(output.request_id) if output.summary else None
                        plan = encode_plan(explanation.plan) if explanation and explanation.plan else None
                        await context.write(codec.encode_output(output, plan))
        except TimeoutError:
            raise DeadlineExceeded("the client did not read its tokens until the deadline") from None

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


async def explain_plan(log: ExplainLog, request_id: str) -> topology_pb2.ExplainPlanResponse:
    """Raises InvalidRequest for a request that is unknown or too long ago."""
    return encode_explanation(log.require(request_id))
