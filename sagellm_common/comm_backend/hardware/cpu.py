"""The processor itself, through our device plug-in for LMDeploy."""

from __future__ import annotations

import platform

from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.core.capability import Accelerator, CapabilityDescriptor, DeviceKind, TransportProfile


def probe(host: Host) -> CapabilityDescriptor:
    total, available = host.memory_bytes()
    return CapabilityDescriptor(
        DeviceKind.CPU,
        (Accelerator(0, platform.machine(), total, available),),
        driver_version="",
        dtypes=("float32", "bfloat16", "float16"),
        kv_quant_bits=(0, 4, 8),
        transport=TransportProfile(("tcp", "gloo", "shm", "mooncake", "rdma"), staged=False, collective="gloo"),
        lmdeploy_device_type="cpu",
    )
