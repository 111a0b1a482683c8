"""Receiver side of the TCP byte path: fills its own blocks straight from the socket, where the host can reach them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.daemon import finished
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.integrity import (
    DIGEST_BYTES,
    check_pull,
    check_targets,
    verify_blocks,
    verify_segment,
)
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.protocol import Encoding, Memory, TransferResult
from sagellm_common.comm_backend.segments import Segment, layers_apart, views
from sagellm_common.comm_backend.wire import Wire, split_address
from sagellm_common.core import failpoints
from sagellm_common.core.errors import Draining, PeerLost, error_for
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource

T = TypeVar("T")
IntArray = NDArray[np.int32]

MAX_PULLS = 64
"""Pulls at a time; more wait, within their deadline."""
MAX_IDLE_PER_PEER = 4


class TcpReceiver:
    """Pulls into a pool. Connections to a peer are kept for the next pull, and dropped after any error."""

    def __init__(self, memory: Memory, *, digest: bool, silence_s: float, messages: MessagePlanner) -> None:
        self._memory = memory
        self._digest = digest
        self._silence_s = silence_s
        self._messages = messages
        self._threads = ThreadPoolExecutor(MAX_PULLS, "kv-pull")
        self._idle: dict[str, list[Wire]] = {}
        self._active: dict[Wire, asyncio.Future[Any]] = {}
        self._closed = False

    async def pull(
        self,
        source: KvSource,
        source_blocks: BlockIds,
        target_blocks: BlockIds,
        *,
        timeout_s: float,
        into: KvMemory | None = None,
        encoding: Encoding | None = None,
    ) -> TransferResult:
        """See `KVTransferChannel.pull`. When it returns or raises, nobody writes to the target blocks any more."""
        memory = into or self._memory()
        check_pull(memory, source_blocks, target_blocks)
        began_s, deviation = time.monotonic(), None
        if len(target_blocks):
            deviation = await self._run(
                source,
                began_s + timeout_s,
                lambda wire: self._transfer(wire, memory, source, source_blocks, target_blocks, encoding),
            )
        num_bytes = len(target_blocks) * memory.block_bytes
        return TransferResult(num_bytes, time.monotonic() - began_s, len(target_blocks), deviation)

    async def pull_along(
        self,
        source: KvSource,
        first_block: int,
        target_blocks: BlockIds,
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None],
        into: KvMemory | None = None,
        encoding: Encoding | None = None,
    ) -> TransferResult:
        """See `KVTransferChannel.pull_along`, and `pull`."""
        memory = into or self._memory()
        check_targets(memory, target_blocks)
        seconds, deviation = 0.0, None
        if len(target_blocks):
            seconds, deviation = await self._run(
                source,
                time.monotonic() + timeout_s,
                lambda wire: self._transfer_along(wire, memory, source, first_block, target_blocks, on_bytes, encoding),
            )
        return TransferResult(len(target_blocks) * memory.block_bytes, seconds, len(target_blocks), deviation)

    async def close(self) -> None:
        """Ends all pulls. Idempotent."""
        self._closed = True
        for wire in self._active:
            wire.abort()
        if self._active:
            await asyncio.wait(self._active.values())
        for wires in self._idle.values():
            for wire in wires:
                wire.close()
        self._idle.clear()
        self._threads.shutdown(wait=False)

    async def _run(self, source: KvSource, deadline_s: float, exchange: Callable[[Wire], T]) -> T:
        """`exchange` on a thread and a connection of its own; when this returns or raises, it has ended.

        Raises PeerLost for whatever the connection may fail with.
        """
        try:
            return await self._exchange(source.data_address, deadline_s, exchange)
        except (OSError, EOFError, MalformedFrame) as err:
            raise PeerLost(
                f"transfer {source.transfer_id!r}: source {source.worker_id!r} at {source.data_address} "
                f"was lost: {err or 'it closed the connection'}"
            ) from err

    async def _exchange(self, address: str, deadline_s: float, exchange: Callable[[Wire], T]) -> T:
        wire = await self._connection(address, deadline_s)
        if self._closed:
            wire.close()
            raise Draining("this worker's KV byte path is closed")
        wire.deadline_s = deadline_s
        job = asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, exchange, wire)
        self._active[wire] = job
        try:
            result = await asyncio.shield(job)
        except BaseException:
            wire.abort()
            await finished(job)
            wire.close()
            raise
        finally:
            del self._active[wire]
        self._keep(address, wire)
        return result

    def _transfer(
        self,
        wire: Wire,
        memory: KvMemory,
        source: KvSource,
        source_blocks: BlockIds,
        target_blocks: BlockIds,
        encoding: Encoding | None,
    ) -> Deviation | None:
        """The whole exchange, on a thread of its own."""
        size, metered = memory.block_bytes, meter.current()
        most = frames.max_group_blocks(size)
        plan = self._messages.plan(source, len(target_blocks), size, default_bytes=frames.GROUP_BYTES, max_blocks=most)
        request = frames.encode_pull(
            source.transfer_id,
            source.epoch,
            source_blocks,
            block_bytes=size,
            digest=self._digest,
            timeout_s=wire.deadline_s - time.monotonic(),
            encoding=encoding,
            group_blocks=plan.blocks_per_message,
        )
        wire.send([request])
        self._expect_accepted(wire)
        failpoints.hit("receiver.pulling")
        for group in frames.groups(target_blocks, plan.blocks_per_message):
            digests = bytearray(len(group) * DIGEST_BYTES if self._digest else 0)
            with memory.writing(group) as (region, ids):
                wire.recv_into([*([digests] if self._digest else []), *region.runs(ids)])
                metered.arrived(len(group) * size, len(group))
                if self._digest:
                    with metered.digesting():
                        verify_blocks(region, ids, digests, source.transfer_id, group)
        trailer = wire.recv(len(frames.TRAILER))
        if trailer != frames.TRAILER:
            raise MalformedFrame(f"ended with {bytes(trailer)!r}")
        return _deviation(wire, encoding)

    def _transfer_along(
        self,
        wire: Wire,
        memory: KvMemory,
        source: KvSource,
        first_block: int,
        target_blocks: BlockIds,
        on_bytes: Callable[[int], None],
        encoding: Encoding | None,
    ) -> tuple[float, Deviation | None]:
        """The whole exchange, on a thread of its own; returns the seconds in which bytes moved, too."""
        num_layers, metered = layers_apart(memory), meter.current()
        request = frames.encode_along(
            source.transfer_id,
            source.epoch,
            first_block,
            len(target_blocks),
            num_layers,
            block_bytes=memory.block_bytes,
            digest=self._digest,
            timeout_s=wire.deadline_s - time.monotonic(),
            encoding=encoding,
        )
        wire.send([request])
        self._expect_accepted(wire)
        layers_here, seconds = np.zeros(len(target_blocks), dtype=np.int32), 0.0
        while True:
            kind, segment = frames.decode_segment(wire.recv(frames.SEGMENT.size))
            if kind == frames.SEGMENT_DONE:
                break
            if kind == frames.SEGMENT_WAIT:
                metered.waited()
            if kind == frames.SEGMENT_FAILED:
                self._expect_accepted(wire)
            if kind == frames.SEGMENT_DATA:
                began_s = time.monotonic()
                here = _next_layers(layers_here, segment, first_block, num_layers)
                with memory.writing(target_blocks[here]) as (region, ids):
                    into = views(region, ids, segment, num_layers)
                    self._take_segment(wire, source, segment, into, metered)
                on_bytes(sum(map(len, into)))
                seconds += time.monotonic() - began_s
                failpoints.hit("receiver.pulling")
        if (layers_here != num_layers).any():
            raise MalformedFrame("ended before all blocks were sent")
        return seconds, _deviation(wire, encoding)

    def _take_segment(
        self, wire: Wire, source: KvSource, segment: Segment, into: Sequence[memoryview], metered: PullMeter
    ) -> None:
        digest = bytearray(DIGEST_BYTES if self._digest else 0)
        wire.recv_into([*([digest] if self._digest else []), *into])
        metered.arrived(sum(map(len, into)), segment.num_blocks)
        if self._digest:
            with metered.digesting():
                verify_segment(segment, into, digest, source.transfer_id)

    def _expect_accepted(self, wire: Wire) -> None:
        accepted, reason_bytes, message_bytes = frames.decode_answer(wire.recv(frames.ANSWER.size))
        if not accepted:
            reason = wire.recv(reason_bytes).decode(errors="replace")
            raise error_for(reason, wire.recv(message_bytes).decode(errors="replace"))

    async def _connection(self, address: str, deadline_s: float) -> Wire:
        """An idle connection to the peer that is still good, or a new one. Raises OSError, TimeoutError."""
        idle = self._idle.get(address, [])
        while idle:
            wire = idle.pop()
            if not wire.readable(0):
                return wire
            wire.close()
        self._drop_stale()
        loop = asyncio.get_running_loop()
        wait_s = min(self._silence_s, deadline_s - time.monotonic())
        return Wire(await _connect(loop, address, wait_s), self._silence_s)

    def _keep(self, address: str, wire: Wire) -> None:
        idle = self._idle.setdefault(address, [])
        if self._closed or len(idle) >= MAX_IDLE_PER_PEER:
            wire.close()
        else:
            idle.append(wire)

    def _drop_stale(self) -> None:
        """Closes what peers have left behind, so that restarted ones do not use descriptors up."""
        for address, wires in list(self._idle.items()):
            for wire in [w for w in wires if w.readable(0)]:
                wires.remove(wire)
                wire.close()
            if not wires:
                del self._idle[address]


def _deviation(wire: Wire, encoding: Encoding | None) -> Deviation | None:
    """What ends a transfer in another dtype than the source's."""
    return frames.decode_deviation(wire.recv(frames.DEVIATION.size)) if encoding is not None else None


def _next_layers(layers_here: IntArray, segment: Segment, first_block: int, num_layers: int) -> slice:
    """Which of the blocks asked for the segment is of; counts it. Raises MalformedFrame unless it is what was missing
    next in each of them: then nothing is written outside them, or twice."""
    here = slice(segment.first_block - first_block, segment.end_block - first_block)
    inside = 0 <= here.start < here.stop <= len(layers_here) and segment.end_layer <= num_layers
    if not inside or segment.num_layers < 1 or (layers_here[here] != segment.first_layer).any():
        raise MalformedFrame(f"sent {segment} out of turn")
    layers_here[here] = segment.end_layer
    return here


async def _connect(loop: asyncio.AbstractEventLoop, address: str, timeout_s: float) -> socket.socket:
    try:
        host, port = split_address(address)
    except ValueError as err:
        raise PeerLost(f"KV source: {err}") from err
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(timeout_s):
            await loop.sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    return sock
