"""Transcoding at the ends of a byte path, which moves blocks and knows no layouts.

    source     the pool ──reading──► Outgoing: its blocks in the dtype of the wire ──► the byte path
    receiver   the byte path ──filling──► Incoming: blocks of the wire ──► the pool

Bytes that only change their places are written where they belong (`reshape`), if the pool is memory of the host. What
else there is to do is done with staged blocks: numbers are converted on a thread, while the next group is on its way;
bytes are moved by whoever wrote them, out of its core's cache, which is sooner done than told to another core.
"""

from __future__ import annotations

import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray

from sagellm_common.comm_backend import native
from sagellm_common.comm_backend.kv_dtypes import NAMES, Deviation, parse
from sagellm_common.comm_backend.pieces import Pieces, blocks, copy
from sagellm_common.comm_backend.reshape import reshape_between
from sagellm_common.comm_backend.transcode import Transcoder, with_dtype
from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds, KvLayout

_WORKERS = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="kv-transcode")


class Buffers:
    """Staging memory, kept for the next transfer: memory that the system has to hand out page by page costs as much
    as the transfer. Thread-safe."""

    MAX_IDLE = 4

    def __init__(self) -> None:
        self._idle: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        with self._lock:
            for n, buffer in enumerate(self._idle):
                if buffer.nbytes >= num_bytes:
                    return self._idle.pop(n)
            if self._idle:
                self._idle.pop(0)  # too small for what is asked for nowadays
        return np.empty(num_bytes, np.uint8)

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        with self._lock:
            if len(self._idle) < self.MAX_IDLE:
                self._idle.append(buffer)


def _region(buffer: NDArray[np.uint8], block_bytes: int, num_blocks: int) -> KvRegion:
    return KvRegion(buffer[: num_blocks * block_bytes].data, block_bytes, num_blocks)


class Incoming:
    """A sequence's blocks as the sender has them, from the one that holds token `tokens.start` on: a `KvMemory` whose
    block 0 is that one. What is written, each block once and in order, ends in the pool's `target_blocks`, the
    sequence's block table from its token 0 on.

    For one writer at a time, which may begin anew at block 0 after another one failed. `wait` before anything else is
    done with the target blocks.
    """

    def __init__(
        self,
        transcoder: Transcoder,
        pool: KvMemory,
        target_blocks: BlockIds,
        tokens: range,
        buffers: Buffers,
    ) -> None:
        self.deviation = Deviation()
        self.seconds = 0.0
        """Spent on transcoding what was staged."""
        self._transcoder = transcoder
        self._pool = pool
        self._target_blocks = target_blocks
        self._tokens = tokens
        self._buffers = buffers
        self._on_thread = transcoder.source.dtype != transcoder.target.dtype
        self._size = transcoder.source.block_size_tokens
        self._first = tokens.start // self._size
        able = isinstance(pool, KvRegion) and native.library() is not None
        self._reshape = reshape_between(transcoder.source, transcoder.target) if able else None
        self._whole = range(-(-tokens.start // self._size) - self._first, tokens.stop // self._size - self._first)
        """Blocks of which all tokens are wanted: they can be written where they belong."""
        self.block_bytes = transcoder.source.block_bytes
        self.num_blocks = -(-tokens.stop // self._size) - self._first
        # A device's blocks are written whole: what is missing of the last one waits for the next group.
        self._whole_blocks = not isinstance(pool, KvRegion)
        self._done = tokens.start
        """Tokens before it are in the pool, or on their way there."""
        self._next = 0
        """Blocks before it were written."""
        self._kept: NDArray[np.uint8] = np.empty(0, np.uint8)
        """Of blocks that were written and hold tokens from `_done` on, the bytes."""
        self._job: Future[None] | None = None

    def _restart(self) -> None:
        self.deviation = Deviation()
        self._done, self._next, self._kept = self._tokens.start, 0, np.empty(0, np.uint8)

    def reading(self, block_ids: BlockIds) -> AbstractContextManager[tuple[KvRegion, BlockIds]]:
        raise io.UnsupportedOperation("incoming blocks are only written")

    @contextmanager
    def writing(self, block_ids: BlockIds) -> Iterator[tuple[KvRegion, BlockIds]]:
        """See `KvMemory`. Blocks until what was written before the last time is transcoded."""
        count = self._begin(block_ids)
        kept = len(self._kept) // self.block_bytes
        buffer = self._buffers.take((kept + count) * self.block_bytes)
        try:
            buffer[: len(self._kept)] = self._kept
            region = _region(buffer, self.block_bytes, kept + count)
            yield region, np.arange(kept, kept + count, dtype=np.int32)
            self.wait()
        except BaseException:
            self._buffers.give_back(buffer)
            raise
        self._next += count
        start = (self._first + self._next - kept - count) * self._size
        stop = min((self._first + self._next) * self._size, self._tokens.stop)
        if self._whole_blocks and stop < self._tokens.stop:
            ours = self._transcoder.target.block_size_tokens
            stop = max(self._done, stop // ours * ours)
        tokens, self._done = range(self._done, stop), stop
        left = (self._first + self._next) - stop // self._size if stop < self._tokens.stop else 0
        end = (kept + count) * self.block_bytes
        self._kept = buffer[end - left * self.block_bytes : end].copy()
        if self._on_thread:
            self._job = _WORKERS.submit(self._move, buffer, region, start, tokens)
        else:
            self._move(buffer, region, start, tokens)

    @property
    def in_place(self) -> bool:
        """Whether whole blocks are written where they belong."""
        return self._reshape is not None

    def stretches(self, block_ids: BlockIds) -> list[slice]:
        """The blocks, which are in order, in runs to be filled at a time."""
        first, end = (int(block_ids[0]), int(block_ids[-1]) + 1) if len(block_ids) else (0, 0)
        cuts = {first, end, *(at for at in (self._whole.start, self._whole.stop) if first < at < end)}
        return [slice(a - first, b - first) for a, b in itertools.pairwise(sorted(cuts))]

    @contextmanager
    def filling(self, block_ids: BlockIds) -> Iterator[Pieces]:
        """`writing`, as the pieces to be filled in the order of the wire: the pool's own, where that can be."""
        in_place = len(block_ids) and block_ids[0] in self._whole and block_ids[-1] in self._whole
        if self._reshape is None or not in_place:
            with self.writing(block_ids) as (region, ids):
                yield blocks(region, ids)
            return
        count = self._begin(block_ids)
        self.wait()
        start = (self._first + self._next) * self._size
        assert isinstance(self._pool, KvRegion)
        yield self._reshape.pieces(self._pool, self._target_blocks, start, count)
        self._next, self._done = self._next + count, start + count * self._size

    def _begin(self, block_ids: BlockIds) -> int:
        """How many blocks. Raises ValueError unless they are the next ones, or the first: then all begins anew."""
        count = len(block_ids)
        if self._next and count and block_ids[0] == 0:
            self.wait()
            self._restart()
        if not np.array_equal(block_ids, np.arange(self._next, self._next + count)):
            raise ValueError(f"blocks {block_ids.tolist()} were filled after {self._next} of {self.num_blocks}")
        return count

    def wait(self) -> None:
        """Until nothing is being transcoded. Raises what that failed with."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _move(self, buffer: NDArray[np.uint8], staged: KvRegion, start: int, tokens: range) -> None:
        """`tokens` of a sequence that is staged from token `start` on."""
        began_s = time.perf_counter()
        ours = self._transcoder.target.block_size_tokens
        first, end = tokens.start // ours, -(-tokens.stop // ours)
        try:
            if tokens:
                with self._pool.writing(self._target_blocks[first:end]) as (region, ids):
                    moved = self._transcoder.move(
                        staged,
                        np.arange(staged.num_blocks, dtype=np.int32),
                        region,
                        ids,
                        tokens,
                        source_start=start,
                        target_start=first * ours,
                    )
                self.deviation.add(moved)
        finally:
            self._buffers.give_back(buffer)
            self.seconds += time.perf_counter() - began_s


def in_place(memory: KvMemory) -> bool:
    """Whether `filling` names the memory itself."""
    return memory.in_place if isinstance(memory, Incoming) else isinstance(memory, KvRegion)


def stretches(memory: KvMemory, block_ids: BlockIds) -> list[slice]:
    """The blocks in runs that `filling` takes, one after the other."""
    return memory.stretches(block_ids) if isinstance(memory, Incoming) else [slice(None)]


@contextmanager
def filling(memory: KvMemory, block_ids: BlockIds) -> Iterator[Pieces]:
    """`memory.writing`, as the pieces to be filled in the order of the wire; a unit (see `Pieces`) is a block."""
    if isinstance(memory, Incoming):
        with memory.filling(block_ids) as pieces:
            yield pieces
    else:
        with memory.writing(block_ids) as (region, ids):
            yield blocks(region, ids)


def fill(memory: KvMemory, block_ids: BlockIds, staged: Pieces) -> None:
    """Copies `staged`, a piece for each block in turn, into the blocks."""
    for part in stretches(memory, block_ids):
        with filling(memory, block_ids[part]) as into:
            begins = into.within_units(staged.offsets[part])
            copy(Pieces(staged.memory, begins, into.sizes, staged.region), into, digest=False)


class Outgoing:
    """The blocks of a pool as they are sent, in another dtype: a `KvMemory` to be read.

    `partial` names a block that is not full, and how many tokens it has: what lies in its other slots is not read.
    """

    def __init__(
        self, transcoder: Transcoder, pool: KvMemory, buffers: Buffers, partial: tuple[int, int] | None = None
    ) -> None:
        self.deviation = Deviation()
        self._transcoder = transcoder
        self._pool = pool
        self._buffers = buffers
        self._partial = partial
        self.block_bytes = transcoder.target.block_bytes
        self.num_blocks = pool.num_blocks

    def writing(self, block_ids: BlockIds) -> AbstractContextManager[tuple[KvRegion, BlockIds]]:
        raise io.UnsupportedOperation("outgoing blocks are only read")

    @contextmanager
    def reading(self, block_ids: BlockIds) -> Iterator[tuple[KvRegion, BlockIds]]:
        """See `KvMemory`. Blocks until they are transcoded."""
        count, size = len(block_ids), self._transcoder.target.block_size_tokens
        buffer = self._buffers.take(count * self.block_bytes)
        try:
            region = _region(buffer, self.block_bytes, count)
            staged = np.arange(count, dtype=np.int32)
            with self._pool.reading(block_ids) as (pool, ids):
                for n, block_id in enumerate(block_ids.tolist()):
                    num_tokens = size
                    if self._partial is not None and self._partial[0] == block_id:
                        num_tokens = self._partial[1]
                        region.block(n)[:] = bytes(self.block_bytes)
                    tokens = range(n * size, n * size + num_tokens)
                    self.deviation.add(self._transcoder.move(pool, ids, region, staged, tokens))
            yield region, staged
        finally:
            self._buffers.give_back(buffer)


class Encoder:
    """A pool's blocks in whatever dtype a receiver asks for."""

    def __init__(self, memory: Callable[[], KvMemory], layout: Callable[[], KvLayout]) -> None:
        self._memory = memory
        self._layout = layout
        self._buffers = Buffers()

    def __call__(self, dtype: str, partial: tuple[int, int]) -> Outgoing:
        """Raises LayoutMismatch for a dtype that cannot be made of the pool's."""
        layout, wanted = self._layout(), parse(dtype)
        if wanted is None:
            raise LayoutMismatch(f"KV cannot be sent as {dtype!r}: known are {', '.join(NAMES)}")
        return Outgoing(Transcoder(layout, with_dtype(layout, wanted)), self._memory(), self._buffers, partial)
