"""KV blocks in the tensors of a device, in LMDeploy's own layout, staged through host memory for the byte paths.

    device, per tensor (keys, values, and scales when quantised):   [layers, blocks, …]
    one block on the wire:   | keys of all layers | values of all layers | key scales | value scales |

LMDeploy's layout stays as it is, with a layer's blocks side by side. Putting a block's layers side by side instead, as
the CPU plug-in does, would have its Triton kernels compute block number x stride beyond 31 bits from 4 GiB of bf16 on:
they load the block numbers as int32. And a copy to the host is needed for a socket in any case.

    device blocks ──gather──► device buffer ──copy──► pinned buffer ──► socket
    device blocks ◄─scatter── device buffer ◄──copy── pinned buffer ◄── socket
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class TensorKvMemory:
    """A `KvMemory` over `caches`, each [layers, blocks, …] of one device. Thread-safe.

    A block's bytes may be read once the step that wrote them is over, as told by its outputs. Copies run on streams of
    their own and are complete when a context ends, so the engine's next step sees them.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self._device = caches[0].device
        self.num_blocks = int(caches[0].shape[1])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # our streams do not wait for whatever filled the caches
        rows = [cache.flatten(2) for cache in caches]  # [layers, blocks, elements of a block in a layer]
        for row, cache in zip(rows, caches, strict=True):
            if row.data_ptr() != cache.data_ptr():
                raise ValueError(f"a block of a layer is not contiguous: shape {cache.shape}, strides {cache.stride()}")
        layer_bytes = [row.shape[2] * row.itemsize for row in rows]
        word = next(word for word in _WORDS if all(size % word.itemsize == 0 for size in layer_bytes))
        self._parts = [row.view(word) for row in rows]
        self._sizes = [part.shape[0] * part.shape[2] for part in self._parts]  # words of a block in each part
        self.block_bytes = sum(self._sizes) * word.itemsize
        self._idle: list[_Staging] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def reading(self, block_ids: BlockIds) -> Iterator[tuple[KvRegion, BlockIds]]:
        """See `KvMemory`."""
        with self._staging(len(block_ids)) as staging:
            with staging.stream():
                self.gather(block_ids, staging.device[: len(block_ids)])
                staging.to_host(len(block_ids))
            yield staging.region, np.arange(len(block_ids), dtype=np.int32)

    @contextlib.contextmanager
    def writing(self, block_ids: BlockIds) -> Iterator[tuple[KvRegion, BlockIds]]:
        """See `KvMemory`. After an error the blocks are as they were."""
        with self._staging(len(block_ids)) as staging:
            yield staging.region, np.arange(len(block_ids), dtype=np.int32)
            with staging.stream():
                staging.to_device(len(block_ids))
                self.scatter(staging.device[: len(block_ids)], block_ids)

    # For byte paths that reach the device themselves (`DeviceKvMemory`): on the caller's stream.

    def gather(self, block_ids: BlockIds, rows: Tensor) -> None:
        """Blocks into rows [blocks, block_bytes] of uint8 on the device."""
        with torch.inference_mode():
            ids = self._on_device(block_ids)
            for part, into in zip(self._parts, self._split(rows.view(self._parts[0].dtype)), strict=True):
                into.copy_(part.index_select(1, ids).transpose(0, 1))

    def scatter(self, rows: Tensor, block_ids: BlockIds) -> None:
        """The way back."""
        with torch.inference_mode():
            ids = self._on_device(block_ids)
            for part, source in zip(self._parts, self._split(rows.view(self._parts[0].dtype)), strict=True):
                part.index_copy_(1, ids, source.transpose(0, 1))

    def _on_device(self, block_ids: BlockIds) -> Tensor:
        """Raises IndexError outside the pool: a device would only tell much later, and stop working."""
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < self.num_blocks:
            raise IndexError(
                f"blocks {block_ids.min()}..{block_ids.max()} are outside the pool of {self.num_blocks} blocks"
            )
        return torch.from_numpy(block_ids.astype(np.int64)).to(self._device)

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Whole blocks [n, words] as one [n, layers, words of a layer] view per part."""
        parts = zip(torch.split(rows, self._sizes, dim=1), self._parts, strict=True)
        return [words.view(len(rows), part.shape[0], part.shape[2]) for words, part in parts]

    @contextlib.contextmanager
    def _staging(self, num_blocks: int) -> Iterator[_Staging]:
        """Buffers for this many blocks, used by nobody else meanwhile. There are as many as transfers at a time."""
        with self._lock:
            fitting = next((s for s in self._idle if s.region.num_blocks >= num_blocks), None)
            if fitting is not None:
                self._idle.remove(fitting)
            elif self._idle:
                self._idle.pop(0)  # too small for what is asked for nowadays
        staging = fitting or _Staging(self._parts[0], sum(self._sizes), num_blocks)
        try:
            yield staging
        finally:
            with self._lock:
                self._idle.append(staging)


class _Staging:
    """Room for some blocks, on the device and on the host, and the stream that copies between them."""

    def __init__(self, like: Tensor, block_words: int, num_blocks: int) -> None:
        num_blocks = max(1, num_blocks)
        self._cuda = like.device.type == "cuda"
        self.device = torch.empty(num_blocks, block_words, dtype=like.dtype, device=like.device)
        on_host = like.device.type == "cpu"
        self._host = self.device if on_host else torch.empty_like(self.device, device="cpu", pin_memory=self._cuda)
        self._stream: Any = torch.cuda.Stream(like.device) if self._cuda else None  # type: ignore[no-untyped-call]
        host_bytes: Any = self._host.view(torch.uint8).numpy()
        view = memoryview(host_bytes).cast("B")
        self.region = KvRegion(view, block_words * like.itemsize, num_blocks)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """What is done inside is complete afterwards. Waiting for it lets go of the GIL."""
        with torch.inference_mode():
            if self._stream is None:
                yield
                return
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                self._stream.synchronize()

    def to_host(self, num_blocks: int) -> None:
        if self._host is not self.device:
            self._host[:num_blocks].copy_(self.device[:num_blocks], non_blocking=self._cuda)

    def to_device(self, num_blocks: int) -> None:
        if self._host is not self.device:
            self.device[:num_blocks].copy_(self._host[:num_blocks], non_blocking=self._cuda)
