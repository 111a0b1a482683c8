"""Buffers of a pair on a GPU: blocks are gathered there, cross by NCCL, and are scattered there, past the host."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.comm_backend.backends.torch_pair import POLL_S, HostStaging
from sagellm_common.comm_backend.write_gate import WriteGate
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds


@runtime_checkable
class DeviceKvMemory(Protocol):
    """A `KvMemory` on a device, which gathers and scatters blocks there. Rows are [blocks, block_bytes] of uint8 on it.

    Both are ordered after what the thread's current stream was told before, and before what it is told next.
    """

    def gather(self, block_ids: BlockIds, rows: Tensor) -> None: ...

    def scatter(self, rows: Tensor, block_ids: BlockIds) -> None: ...


class DeviceStaging:
    """A pair's buffers on `device`. What is no `DeviceKvMemory` (another layout, on its way through `bridge.Incoming`)
    goes through the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = HostStaging()

    def rows(self, num_blocks: int, block_bytes: int) -> Tensor:
        return torch.empty(num_blocks, block_bytes, dtype=torch.uint8, device=self._device)

    def take(self, memory: KvMemory, block_ids: BlockIds, rows: Tensor) -> None:
        if isinstance(memory, DeviceKvMemory):
            memory.gather(block_ids, rows)
            return
        on_host = torch.empty(rows.shape, dtype=torch.uint8)
        self._host.take(memory, block_ids, on_host)
        rows.copy_(on_host)

    def give(self, rows: Tensor, memory: KvMemory, block_ids: BlockIds) -> None:
        if isinstance(memory, DeviceKvMemory):
            memory.scatter(rows, block_ids)
            self._settle()
        else:
            self._host.give(rows.cpu(), memory, block_ids)

    def digests(self, rows: Tensor) -> bytes:
        """Of each row the sum of its 64-bit words, each times an odd number of its own, modulo 2^64: a change of one
        word always shows, one of several unless it is made to fit these numbers."""
        size = rows.shape[1]
        if size % 8:
            rows = torch.nn.functional.pad(rows, (0, -size % 8))
        words = rows.view(torch.int64)
        sums: Any = (words * _weights(words.shape[1], rows.device)).sum(1)
        return bytes(sums.cpu().numpy().astype("<i8").tobytes())

    def group(self, store: PrefixStore, rank: int, host: str, limit: timedelta) -> Any:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = limit
        torch.cuda.set_device(self._device)  # of this thread: NCCL binds a group to it
        return ProcessGroupNCCL(store, rank, 2, options)

    def wait(self, group: Any, work: Any, limit_s: float, write: WriteGate | None) -> None:
        """NCCL's own wait is the stream's, not the host's, and has no end when the peer is gone: the group has."""
        until_s = time.monotonic() + limit_s
        while not work.is_completed():
            given_up = write is not None and not write.open
            if given_up or time.monotonic() >= until_s:
                group.abort()
                raise RuntimeError("the pull was given up" if given_up else f"NCCL moved no bytes for {limit_s:g} s")
            time.sleep(POLL_S)
        work.wait()

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@lru_cache(maxsize=16)
def _weights(count: int, device: torch.device) -> Tensor:
    """[count] odd numbers: the finalizer of SplitMix64 over 1, 2, … (Steele, Lea, Flood 2014), its lowest bit set."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
