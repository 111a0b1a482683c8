"""A real router over gRPC with an embedded topology, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from prometheus_client import CollectorRegistry

from sagellm_common.client.router import Tokens
from sagellm_common.core.config import Config, RouterConfig, RpcConfig
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import FinishReason, GenerationOutput, GenerationSummary, SamplingParams, pack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, inference_pb2_grpc, topology_pb2, topology_pb2_grpc
from sagellm_common.rpc.status import from_rpc_error
from services.router.__main__ import Router, serving
from services.router.load import WorkerLoad
from services.router.observed import ObservedPipeline, RouterMetrics
from tests.support.scripted_workers import MODEL, ScriptedDecode, ScriptedPrefill, ScriptedWorker
from tests.support.waiting import eventually

W = TypeVar("W", bound=ScriptedWorker)

PATIENCE_S = 10.0
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18, 19]


@dataclass(slots=True)
class Generated:
    """A finished stream, its token indices checked while it came."""

    outputs: list[GenerationOutput] = field(default_factory=list)
    plan: Any = None

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason

    @property
    def summary(self) -> GenerationSummary:
        summary = self.outputs[-1].summary
        assert summary is not None
        return summary

    def add(self, output: GenerationOutput) -> None:
        assert output.index == len(self.tokens), f"token {output.index} came after {len(self.tokens)} tokens"
        self.outputs.append(output)


@dataclass(slots=True)
class RouterHarness:
    topology: EmbeddedTopology
    router: Router
    channel: grpc.aio.Channel
    registry: CollectorRegistry
    workers: list[ScriptedWorker] = field(default_factory=list)

    @property
    def pipeline(self) -> ObservedPipeline:
        return self.router.pipeline

    @property
    def stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def topology_stub(self) -> topology_pb2_grpc.TopologyServiceStub:
        return topology_pb2_grpc.TopologyServiceStub(self.channel)

    async def add(self, worker: W, *, ready: bool = True, **start: Any) -> W:
        """Starts a worker and waits until the router watches it."""
        await worker.start(self.topology, **start)
        self.workers.append(worker)
        if ready:
            await eventually(lambda: self.link(worker) is not None and self.link(worker).reachable)
        return worker

    def link(self, worker: ScriptedWorker) -> Any:
        """The worker as the router sees it; None when it does not."""
        return self.router.workers.find(worker.worker_id, worker.incarnation)

    async def pair(self) -> tuple[ScriptedPrefill, ScriptedDecode]:
        prefill = await self.add(ScriptedPrefill())
        return prefill, await self.add(ScriptedDecode(prefills=[prefill]))

    def call(
        self,
        prompt: Sequence[int] = PROMPT,
        *,
        request_id: str = "r",
        model: str = MODEL.name,
        timeout_s: float | None = PATIENCE_S,
        metadata: Sequence[tuple[str, str]] = (),
        cache_salt: str = "",
        service_class: str = "",
        priority: int = 0,
        tenant: str = "",
        **sampling: Any,
    ) -> Any:
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            model=model,
            prompt_token_ids=pack_int32(prompt),
            cache_salt=cache_salt,
            service_class=service_class,
            priority=priority,
            tenant=tenant,
            sampling=codec.encode_sampling(SamplingParams(**({"max_new_tokens": 6} | sampling))),
        )
        return self.stub.Generate(request, timeout=timeout_s, metadata=tuple(metadata))

    async def generate(self, prompt: Sequence[int] = PROMPT, **kwargs: Any) -> Generated:
        """Raises the SageError the router sent."""
        generated = Generated()
        try:
            async for message in self.call(prompt, **kwargs):
                generated.add(codec.decode_output(message))
                if message.HasField("summary"):
                    generated.plan = message.summary.plan
        except grpc.aio.AioRpcError as err:
            raise from_rpc_error(err) from err
        return generated

    async def explain(self, request_id: str = "r") -> Any:
        return await self.topology_stub.ExplainPlan(
            topology_pb2.ExplainPlanRequest(request_id=request_id), timeout=PATIENCE_S
        )

    async def assert_nothing_held(self) -> None:
        """No request in flight, and nothing reserved, pinned or running on any living worker."""
        await eventually(lambda: self.pipeline.in_flight == 0)
        for worker in self.workers:
            if (link := self.link(worker)) is not None:
                await eventually(lambda link=link: link.work == WorkerLoad(), lambda link=link: link.work)
        for worker in self.workers:
            if worker.dead:
                continue
            if isinstance(worker, ScriptedPrefill):
                await eventually(
                    lambda worker=worker: not worker.pins and not worker.running, lambda worker=worker: worker.worker_id
                )
            if isinstance(worker, ScriptedDecode):
                await eventually(
                    lambda worker=worker: not worker.reservations and not worker.running,
                    lambda worker=worker: worker.worker_id,
                )

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def router_harness(
    carried_by: Choice = "auto", tokens: Tokens = "relayed", route_key: str = "", **router: Any
) -> AsyncIterator[RouterHarness]:
    """`carried_by` is for the router's sessions."""
    config = Config(
        rpc=RpcConfig(session=carried_by, tokens=tokens, route_key=route_key),
        router=RouterConfig(**({"worker_grace_s": 0.5, "resume_grace_s": 0.5} | router)),
    )
    topology, registry = EmbeddedTopology(), CollectorRegistry()
    async with (
        serving(config, topology, metrics=RouterMetrics(registry)) as running,
        grpc.aio.insecure_channel(running.address, options=[("grpc.enable_http_proxy", 0)]) as channel,
    ):
        harness = RouterHarness(topology, running, channel, registry)
        try:
            yield harness
        finally:
            for worker in harness.workers:
                await worker.stop()
