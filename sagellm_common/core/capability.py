"""What the devices of a machine can do for an engine: values, filled in by probes (`comm_backend.hardware`)."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass


class DeviceKind(enum.StrEnum):
    """The values of engine.device, `auto` aside."""

    CPU = "cpu"
    CUDA = "cuda"
    ASCEND = "ascend"
    CAMBRICON = "cambricon"
    HYGON = "hygon"
    KUNLUN = "kunlun"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device, numbered as its vendor's tool does."""

    index: int
    name: str
    memory_total_bytes: int
    memory_free_bytes: int


@dataclass(frozen=True, slots=True)
class TransportProfile:
    """How KV reaches a device and what its ranks talk over.

    `byte_paths` are values of transport.backend; `staged` ones copy through host memory. `collective` is the
    torch.distributed backend.
    """

    byte_paths: tuple[str, ...]
    staged: bool
    collective: str


@dataclass(frozen=True, slots=True)
class CapabilityDescriptor:
    """One kind of device on this machine.

    `dtypes` and `kv_quant_bits` are values of engine.dtype and engine.kv_quant_bits it can serve through LMDeploy.
    `lmdeploy_device_type` is LMDeploy's name for it, empty where it has none. `missing` names what stands in the way
    of serving on it, each with its fix; empty: it is usable.
    """

    kind: DeviceKind
    accelerators: tuple[Accelerator, ...]
    driver_version: str
    dtypes: tuple[str, ...]
    kv_quant_bits: tuple[int, ...]
    transport: TransportProfile
    lmdeploy_device_type: str
    missing: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        return bool(self.accelerators)

    @property
    def summary(self) -> str:
        """Such as `cuda: 2 x NVIDIA H200`."""
        counts = Counter(accelerator.name for accelerator in self.accelerators)
        listed = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
        return f"{self.kind}: {listed or 'none'}"

    @property
    def usable(self) -> bool:
        return self.present and not self.missing
