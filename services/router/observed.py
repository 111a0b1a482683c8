"""The pipeline's numbers, as a wrapper: the pipeline knows nothing of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sagellm_common.core.errors import SageError
from sagellm_common.core.types import FinishReason, GenerationOutput, GenerationRequest

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Generates(Protocol):
    def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerationOutput, None]: ...

    def cancel(self, request_id: str) -> bool: ...

    async def drain(self) -> None: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class Summary(Protocol):
    """Of `GenerationSummary`, here or on the wire, what is counted."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def kv_bytes_transferred(self) -> int: ...
    @property
    def attempts(self) -> int: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def ttft_ms(self) -> float: ...
    @property
    def tpot_ms(self) -> float: ...


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.requests = Counter("sagellm_router_requests", "Requests by outcome", ["code"], registry=registry)
        self.ttft = Histogram(
            "sagellm_router_ttft_seconds", "Admission to first token", buckets=_LATENCY_S, registry=registry
        )
        self.tpot = Histogram(
            "sagellm_router_tpot_seconds", "Mean time per token after the first", buckets=_TOKEN_S, registry=registry
        )
        self.queue = Histogram(
            "sagellm_router_queue_seconds", "Waiting for workers", buckets=_LATENCY_S, registry=registry
        )
        self.prompt_tokens = Counter("sagellm_router_prompt_tokens", "Prompt tokens", registry=registry)
        self.tokens = Counter("sagellm_router_generated_tokens", "Generated tokens", registry=registry)
        self.kv_hit_tokens = Counter(
            "sagellm_router_kv_hit_tokens", "Prompt tokens served from a cache", registry=registry
        )
        self.transfer_bytes = Counter(
            "sagellm_router_kv_transfer_bytes", "KV from prefill to decode", registry=registry
        )
        self.retries = Counter("sagellm_router_retries", "Attempts after a failed one", registry=registry)
        self.in_flight = Gauge("sagellm_router_in_flight_requests", "Requests in flight", registry=registry)
        self.waiting = Gauge(
            "sagellm_router_waiting_requests", "Requests in flight that wait for their turn", registry=registry
        )

    def counted(self, code: str) -> None:
        """A request has ended."""
        self.requests.labels(code).inc()

    def record(self, summary: Summary) -> None:
        self.prompt_tokens.inc(summary.prompt_tokens)
        self.tokens.inc(summary.completion_tokens)
        self.kv_hit_tokens.inc(summary.cached_tokens)
        self.transfer_bytes.inc(summary.kv_bytes_transferred)
        self.retries.inc(max(0, summary.attempts - 1))
        self.queue.observe(summary.queue_ms / 1e3)
        if summary.completion_tokens:
            self.ttft.observe(summary.ttft_ms / 1e3)
        if summary.completion_tokens > 1:
            self.tpot.observe(summary.tpot_ms / 1e3)


class ObservedPipeline:
    """Counts every request once, by how it ended."""

    def __init__(self, inner: Generates, metrics: RouterMetrics) -> None:
        self._inner = inner
        self._metrics = metrics
        metrics.in_flight.set_function(lambda: inner.in_flight)
        metrics.waiting.set_function(lambda: inner.waiting)

    @property
    def in_flight(self) -> int:
        return self._inner.in_flight

    @property
    def waiting(self) -> int:
        return self._inner.waiting

    def cancel(self, request_id: str) -> bool:
        return self._inner.cancel(request_id)

    async def drain(self) -> None:
        await self._inner.drain()

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerationOutput, None]:
        code = "INTERNAL"
        try:
            async with aclosing(self._inner.generate(request, timeout_s)) as outputs:
                async for output in outputs:
                    if output.summary is not None:
                        self._metrics.record(output.summary)
                    if output.finish_reason is not None:
                        code = "CANCELLED" if output.finish_reason is FinishReason.CANCELLED else "OK"
                    yield output
        except SageError as err:
            code = err.reason
            raise
        except (GeneratorExit, asyncio.CancelledError):
            code = code if code == "OK" else "CANCELLED"
            raise
        finally:
            self._metrics.counted(code)
