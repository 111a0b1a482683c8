"""Cambricon MLUs, through cnmon. LMDeploy serves them through DLInfer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.comm_backend.hardware.vendor import MIB, inventory, lacking
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind, TransportProfile

DRIVER = "install the Cambricon driver, and pass /dev/cambricon* to a container"

_CARD = re.compile(r"^\|\s*(\d+)\s+\S*/\s+(\S+)\s+v[\d.]+\s*\|")
_MEMORY = re.compile(r"\|\s*(\d+) MiB/\s*(\d+) MiB\s*\|")


def parse(text: str) -> tuple[Sequence[Accelerator], str]:
    """The table of `cnmon`: two lines per card, the first with number and name, the second with its memory."""
    found: list[Accelerator] = []
    card: tuple[int, str] | None = None
    for line in text.splitlines():
        if match := _CARD.match(line):
            card = int(match[1]), match[2]
        elif card and (match := _MEMORY.search(line)):
            used, total = int(match[1]), int(match[2])
            found.append(Accelerator(*card, total * MIB, (total - used) * MIB))
            card = None
    # `Driver v5.10.22` in the title, or, of older ones, in each card's line.
    version = re.search(r"(?:Driver|\| On)\s+v(\S+)", text)
    return found, version[1] if version else ""


def probe(host: Host) -> CapabilityDescriptor:
    found = inventory(host, [("cnmon",)], parse, "/dev/cambricon_dev[0-9]*", DRIVER)
    packages = [
        ("torch_mlu", "install Cambricon's torch_mlu for your torch version"),
        ("dlinfer", "install dlinfer built for camb, through which LMDeploy serves Cambricon"),
    ]
    return CapabilityDescriptor(
        DeviceKind.CAMBRICON,
        found.accelerators,
        found.driver_version,
        dtypes=("bfloat16", "float16"),
        kv_quant_bits=(0,),
        transport=TransportProfile(("tcp",), staged=True, collective="cncl"),
        lmdeploy_device_type="camb",
        missing=(*found.missing, *lacking(host, packages)),
    )
