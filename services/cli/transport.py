"""`sagellm transport`: what links cost, what is recommended for them, and settings of running workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from sagellm_common.client.router import WorkerTransport
from sagellm_common.comm_backend.topology import MachineTopology, recommend
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.topology import LinkCost

COLUMN_WIDTH = 34
"""Room for a cell of the matrix."""


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Of `key=value`, or `transport.key=value` as in `--set`. Raises ConfigError; the workers check the rest."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is no setting: write key=value, such as chunk_bytes=1048576")
        settings[key.strip().removeprefix("transport.")] = value.strip()
    return settings


def links_document(links: Sequence[LinkCost], failures: Sequence[str] = ()) -> dict[str, Any]:
    """For `--json`; keys are only ever added."""
    advice = recommend(links)
    return {
        "links": [
            {
                "source": link.source_id,
                "target": link.target_id,
                "backend": link.backend,
                "latency_us": link.latency_s * 1e6,
                "bytes_per_s": link.bytes_per_s,
                "per_message_us": link.per_message_s * 1e6,
                "measured_at_s": link.measured_at_s,
                "samples": link.samples,
            }
            for link in links
        ],
        "failures": list(failures),
        "preset": asdict(advice) if advice else None,
    }


def links_matrix(links: Sequence[LinkCost]) -> Table:
    """A row per source, a column per target: bandwidth, latency, byte path."""
    targets = sorted({link.target_id for link in links})
    by_ends = {(link.source_id, link.target_id): link for link in links}
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("FROM \\ TO", no_wrap=True)
    for target in targets:
        table.add_column(escape(target), no_wrap=True)
    for source in sorted({link.source_id for link in links}):
        cells = [by_ends.get((source, target)) for target in targets]
        table.add_row(escape(source), *(_cell(link) if link else "[dim]–[/]" for link in cells))
    return table


def _cell(link: LinkCost) -> str:
    return f"{link.bytes_per_s / 1e9:6.2f} GB/s {link.latency_s * 1e6:6.0f} µs {link.backend}"


def advice_line(links: Sequence[LinkCost]) -> str:
    advice = recommend(links)
    return f"recommended: transport.preset={advice.preset} [dim]({escape(advice.reason)})[/]" if advice else ""


def machine_table(machine: MachineTopology) -> Table:
    """A line per part of this machine; parts that it does not have are left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for node in machine.numa:
        table.add_row(f"NUMA {node.number}", f"CPUs {node.cpus}", f"{node.memory_bytes / 1e9:.0f} GB")
    for nic in machine.nics:
        table.add_row(f"NIC {nic.name}", "up" if nic.up else "down", _speed(nic.bytes_per_s))
    for port in machine.rdma:
        state = "active" if port.active else "down"
        table.add_row(f"RDMA {port.device}/{port.port}", f"{port.link_layer}, {state}", _speed(port.bytes_per_s))
    for pcie in machine.pcie:
        table.add_row(f"PCIe {pcie.address}", f"NUMA {pcie.numa_node}", _speed(pcie.bytes_per_s))
    for link in machine.device_links:
        lanes = f" x{link.lanes}" if link.lanes else ""
        table.add_row(f"{link.kind}{lanes}", f"{link.first} ↔ {link.second}", _speed(link.bytes_per_s))
    return table


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s else "[dim]speed unknown[/]"


def settings_table(workers: Sequence[WorkerTransport]) -> Table:
    """A column per worker; what was changed since it started is marked with what its file says."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    answered = [worker for worker in workers if not worker.error]
    table.add_column("transport.", no_wrap=True)
    for worker in answered:
        table.add_column(escape(worker.worker_id), no_wrap=True)
    for key in dict.fromkeys(key for worker in answered for key in sorted(worker.in_force)):
        table.add_row(key, *(_setting(worker, key) for worker in answered))
    return table


def _setting(worker: WorkerTransport, key: str) -> str:
    loaded = {changed: before for changed, before, _ in worker.changes}
    value = escape(worker.in_force.get(key, "–"))
    return f"[yellow]{value}[/] [dim](file: {escape(loaded[key])})[/]" if key in loaded else value
