"""What `sagellm transport` prints."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from sagellm_common.client.router import WorkerTransport
from sagellm_common.comm_backend.topology import DeviceLink, MachineTopology, Nic, NumaNode, PcieLink, RdmaPort
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.topology import LinkCost
from services.cli.transport import (
    advice_line,
    links_document,
    links_matrix,
    machine_table,
    parse_settings,
    settings_table,
)

LINKS = [
    LinkCost("prefill-0", "decode-0", "shm", 20e-6, 9.5e9, 5e-6, 1e9, 12),
    LinkCost("decode-0", "prefill-0", "tcp", 250e-6, 2.13e9, 0.0, 1e9, 3),
]


def printed(what: object) -> list[str]:
    console = Console(file=StringIO(), width=200)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_matrix_has_a_row_per_source_and_a_column_per_target() -> None:
    head, *rows = printed(links_matrix(LINKS))
    assert head.split()[-2:] == ["decode-0", "prefill-0"]
    assert rows[0].split() == ["decode-0", "–", "2.13", "GB/s", "250", "µs", "tcp"]
    assert rows[1].split() == ["prefill-0", "9.50", "GB/s", "20", "µs", "shm", "–"]


def test_the_document_has_what_scripts_rely_on() -> None:
    document = links_document(LINKS, ["store-0 → decode-0: gone"])
    assert document["links"][0] == {
        "source": "prefill-0",
        "target": "decode-0",
        "backend": "shm",
        "latency_us": pytest.approx(20),
        "bytes_per_s": 9.5e9,
        "per_message_us": pytest.approx(5),
        "measured_at_s": 1e9,
        "samples": 12,
    }
    assert document["failures"] == ["store-0 → decode-0: gone"]
    assert document["preset"]["preset"] == "high-bw"
    assert links_document([])["preset"] is None
    assert "transport.preset=high-bw" in advice_line(LINKS)
    assert advice_line([]) == ""


def test_a_changed_setting_shows_its_file() -> None:
    workers = [
        WorkerTransport("decode-0", {"chunk_bytes": "4096", "fusion": "auto"}, (("chunk_bytes", "0", "4096"),)),
        WorkerTransport("prefill-0", {"chunk_bytes": "0", "fusion": "auto"}, ()),
        WorkerTransport("lost", {}, (), "PEER_LOST gone"),
    ]
    head, first, second = printed(settings_table(workers))
    assert head.split() == ["transport.", "decode-0", "prefill-0"]
    assert first.split() == ["chunk_bytes", "4096", "(file:", "0)", "0"]
    assert second.split() == ["fusion", "auto", "auto"]


def test_parts_of_a_machine() -> None:
    machine = MachineTopology(
        "h",
        (NumaNode(0, "0-7", 64_000_000_000),),
        (Nic("eth0", True, 12.5e9, 0), Nic("eth1", False, 0.0, -1)),
        (RdmaPort("mlx5_0", 1, True, "InfiniBand", 50e9, 0),),
        (PcieLink("0000:18:00.0", 63e9, 0),),
        (DeviceLink("NVLink", 0, 1, 18, 478e9), DeviceLink("HCCS", 2, 3)),
    )
    lines = [" ".join(line.split()) for line in printed(machine_table(machine))]
    assert lines == [
        "NUMA 0 CPUs 0-7 64 GB",
        "NIC eth0 up 12.50 GB/s",
        "NIC eth1 down speed unknown",
        "RDMA mlx5_0/1 InfiniBand, active 50.00 GB/s",
        "PCIe 0000:18:00.0 NUMA 0 63.00 GB/s",
        "NVLink x18 0 ↔ 1 478.00 GB/s",
        "HCCS 2 ↔ 3 speed unknown",
    ]


def test_settings_as_they_are_written() -> None:
    assert parse_settings(["chunk_bytes=1", "transport.fusion= off"]) == {"chunk_bytes": "1", "fusion": "off"}
    for wrong in ("chunk_bytes", "=1"):
        with pytest.raises(ConfigError, match="write key=value"):
            parse_settings([wrong])
