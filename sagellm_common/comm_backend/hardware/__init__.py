"""Which devices this machine has and what keeps LMDeploy from using them.

A probe asks the vendor's own tool, in a process with a deadline, and looks for device nodes and packages. It imports
nothing of the vendor's: what a driver does when it is broken stays in the tool's process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from sagellm_common.comm_backend.hardware import ascend, cambricon, cpu, cuda, hygon, kunlun
from sagellm_common.comm_backend.hardware.host import Host, LocalHost
from sagellm_common.core.capability import CapabilityDescriptor, DeviceKind
from sagellm_common.core.errors import ConfigError

log = logging.getLogger(__name__)

PROBES: Mapping[DeviceKind, Callable[[Host], CapabilityDescriptor]] = {
    DeviceKind.CPU: cpu.probe,
    DeviceKind.CUDA: cuda.probe,
    DeviceKind.ASCEND: ascend.probe,
    DeviceKind.CAMBRICON: cambricon.probe,
    DeviceKind.HYGON: hygon.probe,
    DeviceKind.KUNLUN: kunlun.probe,
}


def probe_all(host: Host | None = None) -> list[CapabilityDescriptor]:
    """Every kind, in the order of DeviceKind. Takes as long as the slowest tools, at most host.TOOL_TIMEOUT_S each."""
    found = host or LocalHost()
    return [probe(found) for probe in PROBES.values()]


def select_device(wanted: str, host: Host | None = None) -> CapabilityDescriptor:
    """The device for engine.device. Raises ConfigError naming what is missing.

    `auto` takes the first usable accelerator, the CPU where there is none, and says in the log why not the others
    that are there.
    """
    found = host or LocalHost()
    if wanted != "auto":
        device = PROBES[DeviceKind(wanted)](found)
        if not device.usable:
            raise ConfigError(f"engine.device: {wanted!r} cannot be used here: {'; '.join(device.missing)}")
        return device
    devices = probe_all(found)
    for device in devices:
        if device.present and device.missing:
            log.warning("engine.device 'auto' passes over %s: %s", device.kind, "; ".join(device.missing))
    usable = [device for device in devices if device.usable]
    chosen = next((device for device in usable if device.kind is not DeviceKind.CPU), usable[0])
    log.info("engine.device 'auto' is %s here", chosen.kind)
    return chosen
