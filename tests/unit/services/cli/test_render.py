from __future__ import annotations

import io

import pytest
from rich.console import Console

from sagellm_common.client.router import ClusterView, Explanation, PlanEvent, WorkerEviction, WorkerView
from sagellm_common.core.types import GenerationSummary, KvOrigins, KvStats, WorkerRecord, WorkerRole
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, IRNode, PlanNodeKind
from services.cli import render
from services.cli.cluster import ClusterEvent
from services.cli.home import ClusterState, ProcessState

PLAN = ExecutionPlan(
    "p",
    "r",
    "fifo",
    (
        IRNode(0, PlanNodeKind.PREFILL, "prefill-0", (), 0, 100, chunk_tokens=16),
        IRNode(1, PlanNodeKind.TRANSFER, "decode-0", (0,), 0, 100),
        IRNode(2, PlanNodeKind.DECODE, "decode-0", (1,), 100, 164),
    ),
)


def printed(what: object) -> list[str]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text().splitlines()


def test_plan_diagram_aligns_what_where_and_which_tokens() -> None:
    kinds, workers, tokens = str(render.plan_diagram(PLAN)).splitlines()
    assert kinds == "  prefill     ──► transfer ──► decode"
    assert workers == "  prefill-0       decode-0     decode-0"
    assert tokens == "  0–100 by 16     0–100        100–164"


def test_eviction_table_has_who_answered() -> None:
    workers = [
        WorkerEviction("decode-0", "arc", 1234),
        WorkerEviction("store-1", "lru", 9, migration="cost"),
        WorkerEviction("store-0", "", 0, "PEER_LOST gone"),
    ]
    assert [line.split() for line in printed(render.eviction_table(workers))[1:]] == [
        ["decode-0", "arc", "1,234", "–"],
        ["store-1", "lru", "9", "cost"],
    ]


def test_status_shows_workers_and_processes_the_topology_lost() -> None:
    record = WorkerRecord("prefill-0", WorkerRole.PREFILL, "h:1", "h:2", "i", 7)
    view = ClusterView(1, "embedded", True, (WorkerView(record, KvStats(9, 4, 3, 2), 1, 0, 0, 0, "framed"),))
    processes = (ProcessState("router", "router", 5, "h:0"), ProcessState("decode-0", "decode", 8, "h:3"))
    lines = printed(render.status_table(ClusterState("c", 1, "/m", processes=processes), view))
    assert lines[1].split() == ["prefill-0", "prefill", "h:1", "7", "serving", "framed", "1", "3", "2", "4", "9"]
    assert lines[2].split() == ["router", "router", "h:0", "5"]
    assert lines[3].split()[4:] == ["not", "in", "the", "topology"]


def test_explanation_lists_stages_in_order() -> None:
    events = (PlanEvent("admit", 0.0, 0.1, ""), PlanEvent("transfer", 12.34, 5.0, "1 MB"))
    lines = printed(render.explanation_table(Explanation(PLAN, events)))
    assert [line.split()[:3] for line in lines[1:3]] == [["admit", "0.0", "0.1"], ["transfer", "12.3", "5.0"]]


def test_summaries_stand_side_by_side_and_tell_caches_apart() -> None:
    origins = KvOrigins(host_tokens=3, peer_tokens=2, store_disk_tokens=5)
    one = GenerationSummary(
        prompt_tokens=40, cached_tokens=30, store_tokens=16, decode_cached_tokens=8, origins=origins
    )
    two = GenerationSummary(prompt_tokens=7, transport="tcp", prefill_worker_id="prefill-0")
    rows = {line[:26].strip(): line[26:].split() for line in printed(render.summaries_table([("a", one), ("b", two)]))}
    assert rows["prompt tokens"] == ["40", "7"]
    assert rows["computed"] == ["10", "7"]
    assert rows["in its own cache"] == ["9", "0"]
    assert rows["in its host memory"] == ["3", "0"]
    assert rows["from another worker"] == ["2", "0"]
    assert rows["from the store"] == ["11", "0"]
    assert rows["from the store's disk"] == ["5", "0"]
    assert rows["on decode already"] == ["8", "0"]
    assert list(one.kv_origins) == ["computed", "decode_cache", "host", "peer", "store", "store_disk"]
    assert list(two.kv_origins)[1] == "prefill_cache"
    assert sum(one.kv_origins.values()) == 40
    assert "attempts" not in rows


@pytest.mark.parametrize(
    ("num", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (3e9, "3.00 GB")]
)
def test_size(num: int, text: str) -> None:
    assert render.size(num) == text


def test_startup_view_prints_what_people_should_see() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    view = render.StartupView(console)
    for event in (
        ClusterEvent("starting", "decode-0"),
        ClusterEvent("ready", "decode-0", "h:1"),
        ClusterEvent("died", "decode-0", "killed by SIGKILL"),
        ClusterEvent("stopped", "decode-0"),
    ):
        view.on_event(event)
    assert console.export_text().split() == ["✓", "decode-0", "h:1", "!", "decode-0", "died", "killed", "by", "SIGKILL"]
