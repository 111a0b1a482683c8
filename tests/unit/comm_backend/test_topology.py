"""What a machine says of its connections: recorded ones, and this one."""

from __future__ import annotations

import pytest

from sagellm_common.comm_backend.hardware.host import LocalHost, ToolRun
from sagellm_common.comm_backend.topology import (
    GBIT,
    DeviceLink,
    Nic,
    NumaNode,
    PcieLink,
    RdmaPort,
    host_key,
    parse_matrix,
    probe_machine,
    recommend,
)
from sagellm_common.core.topology import LinkCost
from tests.support.recorded_machines import RecordedHost, recorded

SERVER = {
    "/proc/sys/kernel/random/boot_id": "11111111-2222\n",
    "/proc/self/ns/pid": "pid:[4026531836]",
    "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       1048576 kB\nNode 0 MemFree: 5 kB\n",
    "/sys/devices/system/node/node0/cpulist": "0-47,96-143\n",
    "/sys/devices/system/node/node1/meminfo": "Node 1 MemTotal:       2097152 kB\n",
    "/sys/devices/system/node/node1/cpulist": "48-95,144-191\n",
    "/sys/devices/system/node/node10/cpulist": "\n",
    "/sys/class/net/lo/operstate": "unknown\n",
    "/sys/class/net/eth0/operstate": "up\n",
    "/sys/class/net/eth0/speed": "100000\n",
    "/sys/class/net/eth0/device/numa_node": "1\n",
    "/sys/class/net/eth1/operstate": "down\n",
    "/sys/class/net/eth1/speed": "-1\n",
    "/sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    "/sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
    "/sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
    "/sys/class/infiniband/mlx5_0/device/numa_node": "0\n",
    "/sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
    "/sys/class/infiniband/mlx5_1/ports/1/link_layer": "Ethernet\n",
    "/sys/bus/pci/devices/0000:18:00.0/class": "0x030200\n",
    "/sys/bus/pci/devices/0000:18:00.0/current_link_speed": "32.0 GT/s PCIe\n",
    "/sys/bus/pci/devices/0000:18:00.0/current_link_width": "16\n",
    "/sys/bus/pci/devices/0000:18:00.0/numa_node": "0\n",
    "/sys/bus/pci/devices/0000:19:00.0/class": "0x020000\n",
}


def test_a_server_with_two_sockets_and_infiniband() -> None:
    machine = probe_machine(RecordedHost(files=SERVER))
    assert machine.host_key == "11111111-2222/pid:[4026531836]"
    assert machine.numa == (
        NumaNode(0, "0-47,96-143", 1 << 30),
        NumaNode(1, "48-95,144-191", 2 << 30),
        NumaNode(10, "", 0),
    )
    assert machine.nics == (Nic("eth0", True, 100 * GBIT, 1), Nic("eth1", False, 0.0, -1))
    assert machine.rdma == (
        RdmaPort("mlx5_0", 1, True, "InfiniBand", 400 * GBIT, 0),
        RdmaPort("mlx5_1", 1, False, "Ethernet", 0.0, -1),
    )
    assert machine.has_rdma
    assert machine.pcie == (PcieLink("0000:18:00.0", pytest.approx(63.0e9, rel=0.01), 0),)
    assert machine.device_links == ()


@pytest.mark.parametrize(
    ("tool", "recording", "links"),
    [
        (
            "nvidia-smi topo -m",
            "nvidia-smi-topo.h200.txt",
            [DeviceLink("NVLink", a, b, 18) for a, b in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]],
        ),
        (
            "npu-smi info -t topo",
            "npu-smi-topo.910b3.txt",
            [DeviceLink("HCCS", a, b) for a, b in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]],
        ),
        ("cnmon topo -m", "cnmon-topo.mlu370.txt", [DeviceLink("MLU-Link", 0, 1), DeviceLink("MLU-Link", 2, 3)]),
        ("hy-smi --showtopotype", "hy-smi-topo.k100.txt", [DeviceLink("xGMI", 0, 1)]),
        ("xpu-smi topo -m", "xpu-smi-topo.p800.txt", [DeviceLink("XPULink", 0, 1)]),
    ],
)
def test_links_between_accelerators(tool: str, recording: str, links: list[DeviceLink]) -> None:
    assert list(probe_machine(RecordedHost({tool: recorded(recording)})).device_links) == links


def test_nvlink_has_a_bandwidth_where_the_tool_tells_one() -> None:
    tools = {
        "nvidia-smi topo": recorded("nvidia-smi-topo.h200.txt"),
        "nvidia-smi nvlink": recorded("nvidia-smi-nvlink.h200.txt"),
    }
    first = probe_machine(RecordedHost(tools)).device_links[0]
    assert first.bytes_per_s == pytest.approx(18 * 26.562e9)


@pytest.mark.parametrize("said", ["", "no devices were found", ToolRun(problem="nvidia-smi failed with exit code 9")])
def test_a_tool_without_a_matrix_says_nothing(said: str | ToolRun) -> None:
    assert probe_machine(RecordedHost({"nvidia-smi topo": said})).device_links == ()


def test_columns_that_are_no_devices_are_passed_over() -> None:
    matrix = "NIC0 GPU0 NIC1 GPU1\nGPU0 SYS X PIX NV4\nGPU1 SYS NV4 PIX X\n"
    assert parse_matrix(matrix) == [(0, 1, "NV4")]


def test_this_machine_tells_something_and_is_itself() -> None:
    machine = probe_machine()
    assert machine.host_key == host_key(LocalHost()) != ""
    assert machine.numa


def test_a_machine_without_proc_is_nobodys_neighbour() -> None:
    assert host_key(RecordedHost()) == ""


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s", "preset"),
    [(50e-6, 20e9, "high-bw"), (5e-3, 20e9, "low-latency"), (50e-6, 1e9, "low-cost")],
)
def test_the_slowest_link_decides_on_the_preset(latency_s: float, bytes_per_s: float, preset: str) -> None:
    slow = LinkCost("a", "b", "tcp", latency_s, bytes_per_s)
    advice = recommend([LinkCost("a", "c", "shm", 1e-6, 90e9), slow])
    assert advice is not None
    assert (advice.preset, "a → b (tcp)" in advice.reason) == (preset, True)


def test_nothing_measured_is_no_advice() -> None:
    assert recommend([]) is None
