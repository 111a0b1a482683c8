"""Kunlunxin XPUs, through xpu-smi. LMDeploy 0.11.0 does not serve them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.comm_backend.hardware.vendor import MIB, inventory
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind, TransportProfile

DRIVER = "install the Kunlunxin driver and XRE, and pass /dev/xpu* and /dev/xpuctrl to a container"

_ID, _USED_MB, _TOTAL_MB = 1, 17, 18
"""Columns of `xpu-smi -m`, blank-separated. The last is the product's name in quotation marks."""


def parse(text: str) -> tuple[Sequence[Accelerator], str]:
    """One line per device. Nothing of Intel's tool of the same name, which has no such output."""
    found = []
    for line in text.splitlines():
        columns, name = line.split(), re.search(r'"([^"]+)"', line)
        if len(columns) <= _TOTAL_MB or not re.match(r"[0-9a-fA-F]{4}:", columns[0]):
            continue
        if not all(columns[n].isdigit() for n in (_ID, _USED_MB, _TOTAL_MB)):
            continue
        total, used = int(columns[_TOTAL_MB]), int(columns[_USED_MB])
        label = f"Kunlunxin {name[1] if name else 'XPU'}"
        found.append(Accelerator(int(columns[_ID]), label, total * MIB, (total - used) * MIB))
    return found, ""


def _driver_version(host: Host) -> str:
    for tool in ("xpu-smi", "xpu_smi"):
        run = host.run(tool, "-q")
        if run is not None and (version := re.search(r"Driver Version\s*:\s*(\S+)", run.stdout)):
            return version[1]
    return ""


def probe(host: Host) -> CapabilityDescriptor:
    found = inventory(host, [("xpu-smi", "-m"), ("xpu_smi", "-m")], parse, "/dev/xpu[0-9]*", DRIVER)
    unknown = (
        "LMDeploy 0.11.0 has no device_type for Kunlunxin XPU, and DLInfer has no backend for it; "
        "a backend in DLInfer is what it takes"
    )
    return CapabilityDescriptor(
        DeviceKind.KUNLUN,
        found.accelerators,
        _driver_version(host) if found.accelerators else "",
        dtypes=(),
        kv_quant_bits=(),
        transport=TransportProfile(("tcp",), staged=True, collective="bkcl"),
        lmdeploy_device_type="",
        missing=(*found.missing, unknown),
    )
