"""Traces (OpenTelemetry, W3C context) and logs. Metrics are prometheus_client objects next to what they measure."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

_propagator = TraceContextTextMapPropagator()
# A proxy: it follows the provider that `setup_tracing` installs later.
_tracer = trace.get_tracer("sagellm")


def setup_tracing(service_name: str, otlp_endpoint: str = "", exporter: SpanExporter | None = None) -> None:
    """Installs the process-wide tracer, once, at the start.

    Spans go to `exporter` as they end (tests), else in batches to the OTLP gRPC collector at `otlp_endpoint`
    (host:port or URL); with neither, traces of callers are passed on but not recorded.
    """
    if exporter is None and not otlp_endpoint:
        return
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service_name}))
    if exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    else:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint, insecure=True)))
    trace.set_tracer_provider(provider)


def idle() -> bool:
    """Nobody records here and no caller's context is to be passed on: the common case, which must cost nothing."""
    # Not `get_tracer_provider`, which looks into the environment each time until a provider is set.
    provider = trace._TRACER_PROVIDER
    return (
        isinstance(_tracer, trace.ProxyTracer)
        and not isinstance(provider, TracerProvider)
        and not trace.get_current_span().get_span_context().is_valid
    )


def shutdown_tracing() -> None:
    """Sends what is still buffered. Blocks for at most the exporter's timeout."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


_NO_SPAN = nullcontext(trace.INVALID_SPAN)


def span(
    name: str, carrier: Mapping[str, str] | None = None, /, **attributes: AttributeValue
) -> AbstractContextManager[Span]:
    """A span around the block: child of `carrier` where given, else of the current one. Errors mark it failed."""
    if not carrier and idle():
        return _NO_SPAN
    parent = _propagator.extract(carrier) if carrier else None
    return _tracer.start_as_current_span(name, context=parent, attributes=attributes)


def current_carrier() -> dict[str, str]:
    """The current trace context as W3C headers, to send along; empty outside any trace."""
    carrier: dict[str, str] = {}
    if not idle():
        _propagator.inject(carrier)
    return carrier


def setup_logging(level: str, name: str = "") -> None:
    """Logs to stderr, one line each, with the name of the process; stdout belongs to the program's own output."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s %(levelname).1s {name.replace('%', '%%') + ' ' if name else ''}%(name)s: %(message)s",
        force=True,
    )
