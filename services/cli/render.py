"""What people see: progress while something starts, tables and plans afterwards. Data on stdout, the rest on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sagellm_common.client.aio import Completion
from sagellm_common.client.router import (
    ClassStrategy,
    ClusterView,
    Counterfactual,
    Explanation,
    PlanCandidate,
    WorkerEviction,
)
from sagellm_common.core.capability import CapabilityDescriptor
from sagellm_common.core.types import GenerationSummary
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, IRNode
from services.cli import models
from services.cli.cluster import ClusterEvent
from services.cli.home import ClusterState

# Where nobody resizes a window, tables get the room they need.
PIPE_WIDTH = 120

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH, stderr=True)


# ---- progress ----


class StartupView:
    """One line per process as it comes up, and what is still awaited below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("starting")
        self._awaited: list[str] = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._status:
            yield

    def on_event(self, event: ClusterEvent) -> None:
        """For a Cluster's on_event, also after startup."""
        if event.kind == "starting":
            self._awaited.append(event.process_id)
        else:
            self._awaited = [id for id in self._awaited if id != event.process_id]
        if event.kind == "ready":
            self._console.print(f"  [green]✓[/] {event.process_id:<12} [dim]{event.detail}[/]")
        elif event.kind in ("died", "restarting", "gave up"):
            self._console.print(f"  [yellow]![/] {event.process_id:<12} {event.kind} [dim]{event.detail}[/]")
        self._status.update(f"starting {', '.join(self._awaited)}" if self._awaited else "waiting for the gateway")


@contextmanager
def model_progress(console: Console) -> Iterator[models.Progress]:
    """A bar for `models.prepare_smollm2`, gone afterwards; one line where there is no terminal."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, visible=False)

        def show(what: str, done: int, total: int) -> None:
            if done == 0 and not console.is_terminal:
                console.print(f"  preparing {models.SMOLLM2}, once")
            description = f"{models.SMOLLM2}, once: {what}"
            progress.update(task, description=description, completed=done, total=total, visible=True)

        yield show


# ---- data ----


def served(state: ClusterState, logs: Path | None = None, stop_with: str = "") -> Table:
    """Where the cluster can be reached."""
    table = Table.grid(padding=(0, 2, 0, 0))
    rows = [
        ("OpenAI API", f"{state.gateway_url}/v1"),
        ("router", f"{state.router_address} (gRPC)"),
        ("model", state.model_path),
    ]
    if logs:
        rows.append(("logs", str(logs)))
    if stop_with:
        rows.append(("stop", stop_with))
    for label, value in rows:
        table.add_row(f"  {label}", value)
    return table


def eviction_table(workers: Sequence[WorkerEviction]) -> Table:
    """A line per worker and store that answered."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("WORKER", no_wrap=True)
    table.add_column("EVICTION", no_wrap=True)
    table.add_column("CACHED BLOCKS", justify="right", no_wrap=True)
    table.add_column("MIGRATION", no_wrap=True)
    for worker in workers:
        if not worker.error:
            cached = f"{worker.cached_blocks:,}"
            table.add_row(escape(worker.worker_id), escape(worker.policy), cached, escape(worker.migration or "–"))
    return table


def strategy_table(classes: Sequence[ClassStrategy]) -> Table:
    """A line per class of requests that has its own, the first for all others."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("CLASS", no_wrap=True)
    table.add_column("STRATEGY", no_wrap=True)
    table.add_column("PLACED", justify="right", no_wrap=True)
    table.add_column("GOES WITH", no_wrap=True)
    for one in classes:
        name = escape(one.service_class) or "[dim]all others[/]"
        table.add_row(name, escape(one.strategy), f"{one.placed_requests:,}", f"engine.policy={one.engine_policy}")
    return table


def devices_table(devices: Sequence[CapabilityDescriptor]) -> Table:
    """A line per device; below it what is missing. Of what is not there at all, only why we think so."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("engine.device", "", "DEVICE"):
        table.add_column(name, no_wrap=True)
    for name in ("MEMORY", "FREE"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("DTYPES AND WHAT IS MISSING")
    for device in devices:
        if not device.present:
            table.add_row(
                device.kind.value, "[dim]–[/]", "[dim]none[/]", "", "", f"[dim]{escape(device.missing[0])}[/]"
            )
            continue
        said = [" ".join(device.dtypes), *(f"[yellow]{escape(line)}[/]" for line in device.missing)]
        mark = "[green]✓[/]" if device.usable else "[yellow]✗[/]"
        for n, a in enumerate(device.accelerators):
            first = (device.kind.value, mark) if n == 0 else ("", "")
            memory = (size(a.memory_total_bytes), size(a.memory_free_bytes))
            table.add_row(*first, f"{a.index}: {escape(a.name)}", *memory, "\n".join(said) if n == 0 else "")
    return table


def footer(completion: Completion) -> str:
    """One dim line under an answer."""
    s = completion.summary
    parts = (
        f"{s.prompt_tokens} + {s.completion_tokens} tokens",
        f"TTFT {s.ttft_ms:.0f} ms",
        f"TPOT {s.tpot_ms:.1f} ms",
        f"{size(s.kv_bytes_transferred)} of KV moved",
        completion.request_id,
    )
    return f"[dim]{' · '.join(parts)}[/]"


def engines(view: ClusterView) -> str:
    """What computes, and what it lacks; one line unless the workers differ."""
    found = sorted({worker.record.engine for worker in view.workers if worker.record.engine})
    return "\n".join(f"[dim]{escape(engine)}[/]" for engine in found)


def transport_changes(view: ClusterView) -> str:
    """Settings that are no longer as they were loaded, a line per worker; empty when there are none."""
    lines = []
    for worker in view.workers:
        changed = ", ".join(f"transport.{key} {now} (file: {loaded})" for key, loaded, now in worker.transport_changes)
        if changed:
            lines.append(f"[yellow]{escape(worker.record.worker_id)}[/]: {escape(changed)}")
    return "\n".join(lines)


def tiers(view: ClusterView) -> str:
    """What each worker keeps below its pool, a line per worker; empty where there is nothing."""
    lines = []
    for worker in view.workers:
        said = []
        for tier in worker.kv.tiers if worker.kv else ():
            lost = "".join(
                f", {count} {what}"
                for what, count in (("torn", tier.torn_blocks), ("failed", tier.failed_blocks))
                if count
            )
            said.append(
                f"{tier.name} {tier.used_blocks} of {tier.total_blocks} blocks ({size(tier.used_bytes)} {tier.dtype}), "
                f"{tier.hit_blocks} hits{lost}"
            )
        if said:
            lines.append(f"[dim]{escape(worker.record.worker_id)}: {escape('; '.join(said))}[/]")
    return "\n".join(lines)


def status_table(state: ClusterState, view: ClusterView) -> Table:
    """Processes of this machine and what the topology knows of the workers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("ID", "ROLE", "ADDRESS", "PID", "STATE", "SESSION"):
        table.add_column(name, no_wrap=True)
    for name in ("RUNNING", "KV USED", "CACHED", "FREE", "TOTAL"):
        table.add_column(name, justify="right", no_wrap=True)
    seen = set()
    for worker in view.workers:
        record, kv = worker.record, worker.kv
        seen.add(record.worker_id)
        blocks = (kv.used_blocks, kv.cached_blocks, kv.free_blocks, kv.total_blocks) if kv else ("–",) * 4
        table.add_row(
            record.worker_id,
            record.role,
            record.address,
            str(record.pid),
            record.state,
            worker.session or "–",
            str(worker.running_requests),
            *map(str, blocks),
        )
    for process in state.processes:
        if process.id not in seen:
            joining = "" if process.role in ("router", "gateway") else "not in the topology"
            table.add_row(process.id, process.role, process.address, str(process.pid), joining)
    return table


def plan_diagram(plan: ExecutionPlan, states: Mapping[int, str] | None = None) -> Text:
    """One column per step, in order: what, on which worker, on which tokens, and how far it is where `states` tell."""
    columns = [[node.kind.value, node.worker_id, _tokens(node)] for node in plan.nodes]
    styles = ["bold", "", "dim"]
    if states:
        styles.append("dim")
        for column, node in zip(columns, plan.nodes, strict=True):
            column.append(states.get(node.node_id, ""))
    widths = [max(map(len, column)) for column in columns]
    text = Text()
    for row, style in enumerate(styles):
        joint = " ──► " if row == 0 else "     "
        line = "  " + joint.join(f"{column[row]:<{width}}" for column, width in zip(columns, widths, strict=True))
        text.append(line.rstrip() + "\n", style=style)
    return text


def _tokens(node: IRNode) -> str:
    chunks = f" by {node.chunk_tokens}" if node.chunk_tokens else ""
    crossing = f" as {node.wire_dtype}" if node.wire_dtype not in ("", "same") else ""
    source = f" of {node.source_id}" if node.source_id else ""
    return f"{node.start_token}–{node.end_token}{chunks}{crossing}{source}"


def explanation_table(explanation: Explanation) -> Table:
    table = Table(box=None, pad_edge=True, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  STAGE")
    table.add_column("AT MS", justify="right")
    table.add_column("TOOK MS", justify="right")
    table.add_column("DETAIL")
    for event in explanation.events:
        table.add_row(f"  {event.stage}", f"{event.at_ms:.1f}", f"{event.duration_ms:.1f}", event.detail)
    return table


def candidates_table(candidates: Sequence[PlanCandidate]) -> Table:
    """Where a request could have gone, as it was seen then; who was taken is marked."""
    table = Table(box=None, pad_edge=True, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  CANDIDATE", no_wrap=True)
    table.add_column("ROLE", no_wrap=True)
    for name in ("SCORE", "FIRST TOKEN MS", "CACHED", "REQUESTS", "QUEUED TOKENS", "SEQUENCES"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in candidates:
        mark = "[green]✓[/]" if one.chosen else " "
        expected = "–" if one.expected_ms is None else f"{one.expected_ms:.1f}"
        numbers = one.matched_tokens, one.outstanding, one.queued_tokens, one.sequences
        table.add_row(
            f"{mark} {escape(one.worker_id)}", one.role.value, f"{one.score:.2f}", expected, *map(str, numbers)
        )
    return table


def counterfactual(found: Counterfactual | None) -> str:
    """Whether disaggregating paid, a line."""
    if found is None:
        return "[dim]the other way: not known (one way only, or no costs are learned)[/]"
    ways = ("disaggregated", "aggregated") if found.disaggregated else ("aggregated", "disaggregated")
    taken = "" if found.taken_ms is None else f", {found.taken_ms:.1f} ms taken"
    regret = "" if found.regret_ms is None else f"; regret {found.regret_ms:.1f} ms"
    return (
        f"{ways[0]}: {found.expected_ms:.1f} ms expected{taken}; {ways[1]} it would be {found.other_expected_ms:.1f} ms"
        f"{regret}\n[dim]{escape(found.detail)}[/]"
    )


SummaryRow = tuple[str, str]


def summary_rows(summary: GenerationSummary) -> list[SummaryRow]:
    """What happened to one request, as label and value."""
    computed, own_cache, host, peer, stored, disk = summary.kv_origins.values()
    rows = [
        ("prompt tokens", str(summary.prompt_tokens)),
        ("  computed", str(computed)),
        ("  in its own cache", str(own_cache)),
        ("  in its host memory", str(host)),
        ("  from another worker", str(peer)),
        ("  from the store", str(stored)),
        ("  from the store's disk", str(disk)),
        ("  on decode already", str(summary.decode_cached_tokens)),
        ("generated tokens", str(summary.completion_tokens)),
        ("prefill on", summary.prefill_worker_id or "–"),
        ("decode on", summary.decode_worker_id or "–"),
        ("KV moved", size(summary.kv_bytes_transferred)),
        ("  during prefill", size(summary.kv_bytes_ahead)),
        ("  over", summary.transport or "–"),
        ("  in", f"{summary.transfer_ms:.1f} ms"),
        ("TTFT", f"{summary.ttft_ms:.1f} ms"),
        ("TPOT", f"{summary.tpot_ms:.1f} ms"),
    ]
    if summary.kv_conversion:
        rows.append(("  converted", str(summary.kv_conversion)))
    if summary.store_conversion:
        rows.append(("  in the store", summary.store_conversion.said("kept")))
    if summary.attempts > 1:
        rows.append(("attempts", str(summary.attempts)))
    return rows


def summaries_table(titled: Sequence[tuple[str, GenerationSummary]]) -> Table:
    """Requests side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for title, _ in titled:
        table.add_column(title, justify="right", no_wrap=True)
    columns = [dict(summary_rows(summary)) for _, summary in titled]
    labels = [label for label, _ in summary_rows(titled[0][1])]
    for label in labels:
        table.add_row(f"  {label}", *(column.get(label, "") for column in columns))
    return table


def error(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
