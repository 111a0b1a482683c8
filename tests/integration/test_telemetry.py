"""One trace per request over all services, and Prometheus metrics on each of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from concurrent import futures

import grpc
import httpx
import openai
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.support.checks import eventually
from tests.support.cluster import RunningCluster


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector that keeps what it gets: trace id → {(service, span name)}."""

    def __init__(self) -> None:
        self.spans: dict[bytes, set[tuple[str, str]]] = defaultdict(set)

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans[span.trace_id].add((names["service.name"], span.name))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"127.0.0.1:{port}"
    server.stop(None).wait(10)


async def test_one_trace_and_metrics_everywhere(collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    with RunningCluster(f"telemetry.otlp_endpoint={endpoint}") as cluster:
        async with openai.AsyncOpenAI(base_url=f"{cluster.gateway_url}/v1", api_key="none") as client:
            await client.completions.create(model="tiny-llama", prompt="Hello, trace! " * 10, max_tokens=5)

        async def stages() -> set[tuple[str, str]]:
            return max(received.spans.values(), key=len, default=set())

        def complete(found: set[tuple[str, str]]) -> bool:
            names = {name for _, name in found}
            services = {service for service, _ in found}
            return {"admit", "match", "plan", "reserve", "prefill", "transfer", "decode"} <= names and {
                "sagellm-gateway",
                "sagellm-router",
                "sagellm-prefill",
                "sagellm-decode",
            } <= services

        await eventually(stages, complete, 30.0)

        async with httpx.AsyncClient(trust_env=False) as http:
            expected = {
                f"http://{cluster.metrics_address('router')}": "sagellm_router_requests_total",
                f"http://{cluster.metrics_address('prefill-0')}": "sagellm_worker_kv_blocks",
                f"http://{cluster.metrics_address('decode-0')}": "sagellm_worker_kv_blocks",
                f"http://{cluster.metrics_address('kv-store-0')}": "sagellm_worker_kv_blocks",
                cluster.gateway_url: "sagellm_gateway_requests_total",
            }
            for url, name in expected.items():
                answer = await asyncio.wait_for(http.get(f"{url}/metrics", timeout=10), 10)
                assert name in answer.text, url
