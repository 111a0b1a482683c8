"""What prefill and decode tell about a request: one trace, and counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from sagellm_common.core import telemetry
from sagellm_common.core.errors import KvExhausted
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole
from tests.support.simulated_engine import SimulatedEngine
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import Worker, decode_all, generate, request, worker

PROMPT = list(range(1, 15))


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@pytest.fixture
async def pair(router: str) -> AsyncIterator[tuple[Worker, Worker]]:
    async with worker(WorkerRole.PREFILL, router) as prefill, worker(WorkerRole.DECODE, router) as decode:
        yield prefill, decode


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    return made


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_one_trace_over_both_workers(pair: tuple[Worker, Worker], exporter: InMemorySpanExporter) -> None:
    with telemetry.span("request") as root:
        await generate(*pair, request(PROMPT))
    spans = await named(exporter, {"reserve", "prefill", "transfer", "decode"})
    assert {span.context.trace_id for span in spans.values()} == {root.get_span_context().trace_id}
    parents = {name: span.parent.span_id for name, span in spans.items() if span.parent}
    root_id = root.get_span_context().span_id
    assert parents["reserve"] == parents["prefill"] == parents["decode"] == root_id
    assert parents["transfer"] == spans["decode"].context.span_id
    attributes = {name: dict(span.attributes or {}) for name, span in spans.items()}
    assert attributes["transfer"]["blocks"] == 4
    assert attributes["prefill"]["prompt_tokens"] == 14
    assert attributes["decode"]["tokens"] == 7


async def named(exporter: InMemorySpanExporter, names: set[str]) -> dict[str, ReadableSpan]:
    def found() -> dict[str, ReadableSpan]:
        return {span.name: span for span in exporter.get_finished_spans() if span.name in names}

    await eventually(lambda: set(found()) == names, lambda: f"spans: {sorted(found())}")
    return found()


async def test_counts(pair: tuple[Worker, Worker]) -> None:
    counted = {
        ("sagellm_prefill_requests_total", ("outcome", "done")): 2,
        ("sagellm_prefill_tokens_total", ("origin", "computed")): 14 + 2,
        ("sagellm_prefill_tokens_total", ("origin", "cache")): 12,
        **{("sagellm_prefill_tokens_total", ("origin", o)): 0 for o in ("host", "peer", "store", "store_disk")},
        ("sagellm_decode_reservations_total", ("outcome", "done")): 2,
        ("sagellm_decode_requests_total", ("outcome", "length")): 2,
        ("sagellm_decode_tokens_total", None): 14,
        ("sagellm_decode_handoff_blocks_total", ("origin", "pulled")): 4 + 1,
        ("sagellm_decode_handoff_blocks_total", ("origin", "reused")): 3,
        ("sagellm_decode_tpot_seconds_count", None): 2,
        ("sagellm_comm_handoffs_total", ("outcome", "done")): 2,
        ("sagellm_comm_fusion_hits_total", ("backend", "tcp")): 3,
        ("sagellm_comm_first_byte_seconds_count", ("backend", "tcp")): 2,
        ("sagellm_comm_request_share_ratio_count", None): 2,
        ("sagellm_comm_overlap_ratio_count", None): 2,
    }

    def now() -> dict[tuple[str, tuple[str, str] | None], float]:
        return {key: metric(key[0], **dict([key[1]] if key[1] else [])) for key in counted}

    before = now()
    for i in range(2):
        await generate(*pair, request(PROMPT, request_id=f"r{i}"))
        await pair[1].idle()
    assert {key: value - before[key] for key, value in now().items()} == counted


async def test_errors_and_cancellations_are_counted_by_reason(router: str) -> None:
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(num_blocks=4)) as decode:
        exhausted = metric("sagellm_decode_reservations_total", outcome="kv_exhausted")
        cancelled = metric("sagellm_decode_requests_total", outcome="cancelled")
        await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
        with pytest.raises(KvExhausted):
            await decode.decode_session.reserve(request(PROMPT, request_id="r2"), 1, timeout_s=TIMEOUT_S)
        assert metric("sagellm_decode_reservations_total", outcome="kv_exhausted") == exhausted + 1
        decode.engine.pause()
        running = asyncio.create_task(decode_all(decode, request(PROMPT), [1], None))
        await eventually(lambda: bool(decode.engine.submitted))
        decode.decode_session.cancel("r1", 1)
        await asyncio.wait([running])
        await eventually(lambda: metric("sagellm_decode_requests_total", outcome="cancelled") == cancelled + 1)
        decode.engine.resume()
        await decode.idle()
        assert running.exception() is not None
