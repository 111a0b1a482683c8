"""NVIDIA GPUs, through nvidia-smi."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.comm_backend.hardware.vendor import MIB, inventory, lacking
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind, TransportProfile

FIELDS = "index,name,memory.total,memory.free,driver_version"
DRIVER = "install the NVIDIA driver, and start a container with its GPUs (docker run --gpus all)"


def parse(text: str) -> tuple[Sequence[Accelerator], str]:
    """Lines such as `0, NVIDIA H200, 143771, 143157, 580.159.03`, memory in MiB."""
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if len(row) == 5 and row[0].isdigit()]
    # Memory is `[N/A]` where it is the host's, as on Jetson and GB10.
    found = [Accelerator(int(row[0]), row[1], _bytes(row[2]), _bytes(row[3])) for row in rows]
    return found, rows[0][4] if rows else ""


def _bytes(mib: str) -> int:
    return int(mib) * MIB if mib.isdigit() else 0


def probe(host: Host) -> CapabilityDescriptor:
    query = ("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")
    found = inventory(host, [query], parse, "/dev/nvidia[0-9]*", DRIVER)
    # Tensor cores know bfloat16 from compute capability 8.0 (Ampere) on.
    capability = host.run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    old = capability is not None and any(
        line.strip()[:2] in ("5.", "6.", "7.") for line in capability.stdout.splitlines()
    )
    missing = [*found.missing, *lacking(host, [("triton", "pip install triton, which a CUDA build of torch brings")])]
    if host.torch_build() != "cuda":
        missing.append(
            f"torch is built for {host.torch_build() or 'nothing: it is not installed'}, not for CUDA: "
            "install the build of your CUDA version (pytorch.org/get-started)"
        )
    return CapabilityDescriptor(
        DeviceKind.CUDA,
        found.accelerators,
        found.driver_version,
        dtypes=("float16",) if old else ("bfloat16", "float16"),
        kv_quant_bits=(0, 4, 8),
        transport=TransportProfile(("tcp", "gloo", "nccl"), staged=True, collective="nccl"),
        lmdeploy_device_type="cuda",
        missing=tuple(missing),
    )
