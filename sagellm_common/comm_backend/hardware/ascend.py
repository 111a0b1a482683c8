"""Huawei Ascend NPUs, through npu-smi. LMDeploy serves them through DLInfer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.comm_backend.hardware.vendor import MIB, inventory, lacking
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind, TransportProfile

DRIVER = "install the Ascend driver and firmware, and pass /dev/davinci* and /dev/davinci_manager to a container"


def parse(text: str) -> tuple[Sequence[Accelerator], str]:
    """The table of `npu-smi info`: two lines per chip, the first with its name, the second with its memory in MB.

    The memory that holds tensors is HBM where there is some, which then is the last and largest `used / total`.
    """
    found: list[Accelerator] = []
    name = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 3 or not (first := re.match(r"(\d+)\s*(\S*)", cells[0])):
            continue
        if re.fullmatch(r"[0-9A-Fa-f]{4,}:\S+", cells[1]):
            usages = [(int(total), int(used)) for used, total in re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])]
            if name and usages:
                total, used = max(usages)
                found.append(Accelerator(len(found), name, total * MIB, (total - used) * MIB))
            name = ""
        elif first[2] and len(re.findall(r"\d+\s*/\s*\d+", cells[2])) == 1:
            name = f"Ascend {first[2].removeprefix('Ascend')}"
    version = re.search(r"npu-smi\s+(\S+)", text)
    return found, version[1] if version and found else ""


def probe(host: Host) -> CapabilityDescriptor:
    found = inventory(host, [("npu-smi", "info")], parse, "/dev/davinci[0-9]*", DRIVER)
    packages = [
        ("torch_npu", "pip install torch-npu of your torch and CANN versions"),
        ("dlinfer", "pip install dlinfer-ascend, through which LMDeploy serves Ascend"),
    ]
    return CapabilityDescriptor(
        DeviceKind.ASCEND,
        found.accelerators,
        found.driver_version,
        dtypes=("bfloat16", "float16"),
        kv_quant_bits=(0, 8),
        transport=TransportProfile(("tcp",), staged=True, collective="hccl"),
        lmdeploy_device_type="ascend",
        missing=(*found.missing, *lacking(host, packages)),
    )
