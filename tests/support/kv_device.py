"""KV memory of a device, as the nccl byte path sees it, whose bytes a test can look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from sagellm_common.comm_backend.backends.nccl_staging import DeviceStaging
from sagellm_common.comm_backend.backends.torch_pair import HostStaging, Staging
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds


class RegionOnDevice:
    """A `DeviceKvMemory` whose blocks are those of a region of the host."""

    def __init__(self, region: KvRegion) -> None:
        self._pool = torch.from_numpy(np.frombuffer(region.view, np.uint8).reshape(region.num_blocks, -1))
        self.block_bytes, self.num_blocks = region.block_bytes, region.num_blocks

    def gather(self, block_ids: BlockIds, rows: torch.Tensor) -> None:
        rows.copy_(self._pool[torch.from_numpy(block_ids.astype(np.int64))])

    def scatter(self, rows: torch.Tensor, block_ids: BlockIds) -> None:
        self._pool[torch.from_numpy(block_ids.astype(np.int64))] = rows.cpu()

    @contextmanager
    def reading(self, block_ids: BlockIds) -> Iterator[tuple[KvRegion, BlockIds]]:
        raise AssertionError("the host was asked for blocks that are on the device")
        yield

    writing = reading


class OverGloo(DeviceStaging):
    """Of a device that Gloo reaches: the CPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    group, wait = HostStaging.group, HostStaging.wait  # type: ignore[assignment]


def a_staging(variant: str, side: int) -> Staging:
    if variant == "nccl":
        return DeviceStaging(torch.device("cuda", side))
    return OverGloo() if variant == "on-device" else HostStaging()


def on_device(region: KvRegion) -> RegionOnDevice:
    return RegionOnDevice(region)
