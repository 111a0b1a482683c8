"""The pipeline's numbers, as a wrapper: the pipeline knows nothing of them."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

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


class _Distribution:
    """A histogram in plain numbers."""

    def __init__(self, name: str, what: str, bounds: Sequence[float]) -> None:
        self._name, self._what, self._bounds = name, what, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self) -> Metric:
        names = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._name, self._what, buckets=buckets, sum_value=self._sum)


class RouterMetrics:
    """Counts in plain numbers: Prometheus' own objects would take a fifth of what planning a request may cost. They
    are made when somebody asks."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.in_flight: Callable[[], int] = lambda: 0
        self.waiting: Callable[[], int] = lambda: 0
        self._by_code: dict[str, int] = {}
        self._ttft = _Distribution("sagellm_router_ttft_seconds", "Admission to first token", _LATENCY_S)
        self._tpot = _Distribution("sagellm_router_tpot_seconds", "Mean time per token after the first", _TOKEN_S)
        self._queue = _Distribution("sagellm_router_queue_seconds", "Waiting for workers", _LATENCY_S)
        self._prompt_tokens = self._tokens = self._kv_hit_tokens = self._transfer_bytes = self._retries = 0
        registry.register(self)

    def counted(self, code: str) -> None:
        """A request has ended."""
        self._by_code[code] = self._by_code.get(code, 0) + 1

    def record(self, summary: Summary) -> None:
        tokens = summary.completion_tokens
        self._prompt_tokens += summary.prompt_tokens
        self._tokens += tokens
        self._kv_hit_tokens += summary.cached_tokens
        self._transfer_bytes += summary.kv_bytes_transferred
        self._retries += max(0, summary.attempts - 1)
        self._queue.observe(summary.queue_ms / 1e3)
        if tokens:
            self._ttft.observe(summary.ttft_ms / 1e3)
        if tokens > 1:
            self._tpot.observe(summary.tpot_ms / 1e3)

    # ---- Prometheus ----

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("sagellm_router_requests", "Requests by outcome", labels=["code"])
        for code, count in [*self._by_code.items()]:
            requests.add_metric([code], count)
        yield requests
        yield from (self._ttft.family(), self._tpot.family(), self._queue.family())
        counted = {
            "prompt_tokens": ("Prompt tokens", self._prompt_tokens),
            "generated_tokens": ("Generated tokens", self._tokens),
            "kv_hit_tokens": ("Prompt tokens served from a cache", self._kv_hit_tokens),
            "kv_transfer_bytes": ("KV from prefill to decode", self._transfer_bytes),
            "retries": ("Attempts after a failed one", self._retries),
        }
        for name, (what, value) in counted.items():
            yield CounterMetricFamily(f"sagellm_router_{name}", what, value)
        yield GaugeMetricFamily("sagellm_router_in_flight_requests", "Requests in flight", self.in_flight())
        waiting = "Requests in flight that wait for their turn"
        yield GaugeMetricFamily("sagellm_router_waiting_requests", waiting, self.waiting())


class ObservedPipeline:
    """Counts every request once, by how it ended."""

    def __init__(self, inner: Generates, metrics: RouterMetrics) -> None:
        self._inner = inner
        self._metrics = metrics
        metrics.in_flight = lambda: inner.in_flight
        metrics.waiting = lambda: inner.waiting

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
