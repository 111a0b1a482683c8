"""Hygon DCUs, through hy-smi or the rocm-smi it descends from. LMDeploy 0.11.0 does not serve them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.comm_backend.hardware.vendor import MIB, inventory
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind, TransportProfile

DRIVER = "install Hygon's driver and DTK, and pass /dev/kfd, /dev/mkfd and /dev/dri to a container"

_LINE = re.compile(
    r"(?:HCU|DCU)\s*\[(\d+)\]\s*:\s*(Card [Ss]eries|vram Total Memory|vram Total Used Memory)\s*(?:\(MiB\))?\s*:\s*(.+)"
)


def parse(text: str) -> tuple[Sequence[Accelerator], str]:
    """Lines such as `HCU[0] : vram Total Memory (MiB): 65520`; older versions call a device DCU.

    Nothing of AMD's own rocm-smi, which says GPU.
    """
    cards: dict[int, dict[str, str]] = {}
    for number, what, value in _LINE.findall(text):
        cards.setdefault(int(number), {})[what.lower()] = value.strip()
    found = []
    for number, said in sorted(cards.items()):
        total, used = (int(said.get(f"vram total {what}", 0)) for what in ("memory", "used memory"))
        found.append(Accelerator(number, f"Hygon {said.get('card series', 'DCU')}", total * MIB, (total - used) * MIB))
    version = re.search(r"Driver Version:\s*(\S+)", text, re.IGNORECASE)
    return found, version[1] if version and found else ""


def probe(host: Host) -> CapabilityDescriptor:
    flags = ("--showproductname", "--showdriverversion", "--showmeminfo", "vram")
    found = inventory(host, [("hy-smi", *flags), ("rocm-smi", *flags)], parse, "/dev/mkfd", DRIVER)
    unknown = (
        "LMDeploy 0.11.0 has no device_type for Hygon DCU: its kernels are for CUDA's libdevice, and DLInfer has no "
        "backend for DTK; a port of either is what it takes"
    )
    return CapabilityDescriptor(
        DeviceKind.HYGON,
        found.accelerators,
        found.driver_version,
        dtypes=(),
        kv_quant_bits=(),
        transport=TransportProfile(("tcp",), staged=True, collective="nccl"),  # RCCL under NCCL's name
        lmdeploy_device_type="",
        missing=(*found.missing, unknown),
    )
