from __future__ import annotations

import subprocess
import sys

SCRIPT = """
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sagellm_common.core.telemetry import current_carrier, setup_tracing, shutdown_tracing, span

exporter = InMemorySpanExporter()
assert current_carrier() == {}
setup_tracing("router", exporter=exporter)
with span("outer", request_id="r1"):
    carrier = current_carrier()
with span("remote", carrier):
    pass
try:
    with span("failing"):
        raise ValueError("x")
except ValueError:
    pass
outer, remote, failing = exporter.get_finished_spans()
assert carrier["traceparent"].split("-")[1] == format(outer.context.trace_id, "032x")
assert outer.parent is None and dict(outer.attributes) == {"request_id": "r1"}
assert outer.resource.attributes["service.name"] == "router"
assert remote.parent.span_id == outer.context.span_id and remote.context.trace_id == outer.context.trace_id
assert failing.parent is None and not failing.status.is_ok
shutdown_tracing()
"""

LOG_SCRIPT = """
import logging
from sagellm_common.core.telemetry import setup_logging
setup_logging("info", "decode-0 100%")
logging.getLogger("part").info("hello %s", "you")
logging.getLogger("part").debug("hidden")
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the tracer provider can be installed only once in a process."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_spans_join_the_trace_they_are_given() -> None:
    result = run(SCRIPT)
    assert result.returncode == 0, result.stderr


def test_logs_go_to_stderr_under_the_process_name() -> None:
    result = run(LOG_SCRIPT)
    assert result.stdout == ""
    assert result.stderr.rstrip().endswith("I decode-0 100% part: hello you")
    assert "hidden" not in result.stderr
