"""What connects the devices of this machine with each other and with others, as its own files and tools tell it.

    /sys/devices/system/node   NUMA nodes           vendors' tools   accelerator ◄─ NVLink, HCCS, MLU-Link, xGMI, … ─►
    /sys/class/net             network interfaces   /sys/bus/pci     accelerator ◄─ PCIe ─► host
    /sys/class/infiniband      RDMA ports

Costs between workers are not guessed from this, they are measured: see `links`. It decides which byte paths can be
offered at all, and what people see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sagellm_common.comm_backend.hardware.host import Host, LocalHost
from sagellm_common.core.topology import LinkCost

MBIT, GBIT = 1e6 / 8, 1e9 / 8

PCIE_BYTES_PER_S = {2.5: 0.25e9, 5.0: 0.5e9, 8.0: 0.985e9, 16.0: 1.969e9, 32.0: 3.938e9, 64.0: 7.563e9}
"""GT/s → bytes per second of one lane, after 8b/10b, 128b/130b and (64 GT/s) FLIT encoding."""

SAME_MACHINE = ("X", "SYS", "NODE", "PHB", "PXB", "PIX", "PCIE", "NA", "N/A", "-", "0")
"""Cells of the tools' matrices that are no direct link: the way goes over PCIe, or nobody knows."""

DIRECT_LINKS: Sequence[tuple[str, str, str]] = (
    (r"NV\d+", "NVLink", "NVIDIA"),
    (r"HCCS(_SW)?|SIO", "HCCS", "Ascend"),
    (r"MLU-?LINK\d*|ML\d+", "MLU-Link", "Cambricon"),
    (r"XGMI", "xGMI", "Hygon"),
    (r"XPU-?LINK\d*|XL\d+", "XPULink", "Kunlunxin"),
)
"""(cell of the matrix, name of the link, vendor)"""

TOPOLOGY_TOOLS: Sequence[Sequence[str]] = (
    ("nvidia-smi", "topo", "-m"),
    ("npu-smi", "info", "-t", "topo"),
    ("cnmon", "topo", "-m"),
    ("hy-smi", "--showtopotype"),
    ("xpu-smi", "topo", "-m"),
)


@dataclass(frozen=True, slots=True)
class NumaNode:
    number: int
    cpus: str
    """As the kernel lists them, such as `0-31,64-95`."""
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Nic:
    """A network interface. `bytes_per_s` 0: it does not say. `numa_node` -1: it belongs to none."""

    name: str
    up: bool
    bytes_per_s: float
    numa_node: int


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A port of an InfiniBand or RoCE device; only an active one can be used."""

    device: str
    port: int
    active: bool
    link_layer: str
    bytes_per_s: float
    numa_node: int


@dataclass(frozen=True, slots=True)
class PcieLink:
    """How an accelerator hangs on its host."""

    address: str
    bytes_per_s: float
    numa_node: int


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """A direct link between two accelerators. `lanes` and `bytes_per_s` (all lanes, one direction) 0: not said."""

    kind: str
    first: int
    second: int
    lanes: int = 0
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MachineTopology:
    """`host_key` is equal for processes that can share memory: one boot of one kernel, one PID namespace."""

    host_key: str
    numa: tuple[NumaNode, ...]
    nics: tuple[Nic, ...]
    rdma: tuple[RdmaPort, ...]
    pcie: tuple[PcieLink, ...]
    device_links: tuple[DeviceLink, ...]

    @property
    def has_rdma(self) -> bool:
        return any(port.active for port in self.rdma)


def probe_machine(host: Host | None = None) -> MachineTopology:
    """This machine. What a file or a tool does not tell is left out; nothing here raises."""
    found = host or LocalHost()
    return MachineTopology(
        host_key(found),
        tuple(_numa(found)),
        tuple(_nics(found)),
        tuple(_rdma(found)),
        tuple(_pcie(found)),
        tuple(_device_links(found)),
    )


def host_key(host: Host | None = None) -> str:
    """See `MachineTopology`; empty where /proc does not tell, and then nobody is on the same host."""
    found = host or LocalHost()
    boot = found.read("/proc/sys/kernel/random/boot_id")
    return f"{boot.strip()}/{found.link('/proc/self/ns/pid')}" if boot else ""


def rdma_ports(host: Host | None = None) -> list[RdmaPort]:
    return list(_rdma(host or LocalHost()))


# ---- /sys ----


def _numa(host: Host) -> Iterator[NumaNode]:
    for path in _numbered(host.nodes("/sys/devices/system/node/node[0-9]*")):
        memory = re.search(r"MemTotal:\s+(\d+) kB", host.read(f"{path}/meminfo") or "")
        cpus = (host.read(f"{path}/cpulist") or "").strip()
        yield NumaNode(
            int(path.removeprefix("/sys/devices/system/node/node")), cpus, int(memory[1]) << 10 if memory else 0
        )


def _nics(host: Host) -> Iterator[Nic]:
    for path in host.nodes("/sys/class/net/*"):
        name, state = PurePosixPath(path).name, (host.read(f"{path}/operstate") or "").strip()
        if name == "lo":
            continue
        mbit = _int(host.read(f"{path}/speed"))  # -1, or no answer, for what is down or virtual
        yield Nic(name, state == "up", max(0, mbit) * MBIT, _int(host.read(f"{path}/device/numa_node"), -1))


def _rdma(host: Host) -> Iterator[RdmaPort]:
    for path in host.nodes("/sys/class/infiniband/*/ports/*"):
        device, port = PurePosixPath(path).parts[-3], PurePosixPath(path).name
        rate = re.match(r"([\d.]+) Gb/sec", host.read(f"{path}/rate") or "")
        yield RdmaPort(
            device,
            _int(port),
            "ACTIVE" in (host.read(f"{path}/state") or ""),
            (host.read(f"{path}/link_layer") or "").strip(),
            float(rate[1]) * GBIT if rate else 0.0,
            _int(host.read(f"/sys/class/infiniband/{device}/device/numa_node"), -1),
        )


def _pcie(host: Host) -> Iterator[PcieLink]:
    """Display controllers (class 03) with a 3D engine and processing accelerators (class 12)."""
    for path in host.nodes("/sys/bus/pci/devices/*"):
        if (host.read(f"{path}/class") or "")[:6] not in ("0x0302", "0x0380", "0x1200"):
            continue
        speed = re.match(r"([\d.]+)", host.read(f"{path}/current_link_speed") or "")
        lanes = _int(host.read(f"{path}/current_link_width"))
        per_lane = PCIE_BYTES_PER_S.get(float(speed[1]), 0.0) if speed else 0.0
        numa_node = _int(host.read(f"{path}/numa_node"), -1)
        yield PcieLink(PurePosixPath(path).name, per_lane * lanes, numa_node)


def _numbered(paths: Sequence[str]) -> list[str]:
    return sorted(paths, key=lambda path: _int(re.sub(r"\D", "", path)))


def _int(text: str | None, default: int = 0) -> int:
    try:
        return int((text or "").strip())
    except ValueError:
        return default


# ---- the vendors' tools ----


def _device_links(host: Host) -> Iterator[DeviceLink]:
    for argv in TOPOLOGY_TOOLS:
        run = host.run(*argv)
        if run is None or run.problem:
            continue
        per_lane = _nvlink_lane_bytes_per_s(host) if argv[0] == "nvidia-smi" else 0.0
        for first, second, cell in parse_matrix(run.stdout):
            if link := _direct(cell):
                lanes = int(re.sub(r"\D", "", cell) or 0)
                yield DeviceLink(link, first, second, lanes, lanes * per_lane)


def parse_matrix(text: str) -> list[tuple[int, int, str]]:
    """(device, device, cell) above the diagonal of the matrix that all these tools print:

            GPU0    GPU1    NIC0    CPU Affinity
    GPU0     X      NV18    PIX     0-31

    Devices are called GPU, NPU, MLU, Card, HCU, DCU or XPU; other columns are passed over. Of several matrices, as
    hy-smi prints, the one whose cells name links counts.
    """
    found, columns = [], list[tuple[int, int]]()
    for line in text.splitlines():
        words = line.split()
        named = [(at, int(match[1])) for at, word in enumerate(words) if (match := _DEVICE.fullmatch(word))]
        if len(named) > 1 or (len(named) == 1 and len(words) == 1):
            columns = named
        elif columns and len(named) == 1 and named[0][0] == 0:
            row, cells = named[0][1], words[1:]
            found += [(row, device, cells[at]) for at, device in columns if at < len(cells) and device > row]
    return [(row, device, cell) for row, device, cell in found if not cell.isdigit()]


_DEVICE = re.compile(r"(?:GPU|NPU|MLU|Card|HCU|DCU|XPU)(\d+)", re.IGNORECASE)


def _direct(cell: str) -> str:
    if cell.upper() in SAME_MACHINE:
        return ""
    return next((name for form, name, _ in DIRECT_LINKS if re.fullmatch(form, cell, re.IGNORECASE)), "")


def _nvlink_lane_bytes_per_s(host: Host) -> float:
    """`Link 0: 26.562 GB/s` of `nvidia-smi nvlink -s`: one lane, one direction."""
    run = host.run("nvidia-smi", "nvlink", "-s")
    lane = re.search(r"Link \d+: ([\d.]+) GB/s", run.stdout) if run and not run.problem else None
    return float(lane[1]) * 1e9 if lane else 0.0


# ---- advice ----


@dataclass(frozen=True, slots=True)
class Advice:
    preset: str
    reason: str


SLOW_BYTES_PER_S = 1.5e9
"""About a network of 12 Gbit/s: below it KV takes long beside the prefill that made it."""
LATENCY_SHARE = 0.25
TYPICAL_BYTES = 16 << 20
"""KV of some hundred tokens of a model of a few billion parameters."""


def recommend(links: Sequence[LinkCost], typical_bytes: int = TYPICAL_BYTES) -> Advice | None:
    """The preset for the slowest of the links, for that is where a request may wait; None without any."""
    if not links:
        return None
    slowest = max(links, key=lambda link: link.seconds(typical_bytes))
    share = slowest.latency_s / slowest.seconds(typical_bytes)
    name = f"{slowest.source_id} → {slowest.target_id} ({slowest.backend})"
    speed = f"{slowest.bytes_per_s / 1e9:.2f} GB/s"
    if slowest.bytes_per_s < SLOW_BYTES_PER_S:
        return Advice("low-cost", f"{name} moves {speed}, less than {SLOW_BYTES_PER_S / 1e9:g}: spare the link")
    if share > LATENCY_SHARE:
        return Advice(
            "low-latency",
            f"{name} takes {slowest.latency_s * 1e6:.0f} µs before the first byte, {share:.0%} of a transfer of "
            f"{typical_bytes >> 20} MiB",
        )
    return Advice("high-bw", f"{name}, the slowest, moves {speed}, and latency is {share:.0%} of a transfer")
