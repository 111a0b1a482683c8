"""Receiver side of a byte path over stream sockets: connections, deadlines, and what is asked for in which order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.bridge import filling, in_place, stretches
from sagellm_common.comm_backend.daemon import finished
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.integrity import DIGEST_BYTES, check_pull, check_targets, verify_digests
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import Offsets, Pieces, of_segment
from sagellm_common.comm_backend.protocol import Encoding, Memory, Pull, PullAlong, TransferResult
from sagellm_common.comm_backend.segments import Segment, layers_apart
from sagellm_common.comm_backend.wire import SMALL_BLOCKS, Wire
from sagellm_common.core import failpoints
from sagellm_common.core.errors import Draining, PeerLost, error_for
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds, KvSource

T = TypeVar("T")
IntArray = NDArray[np.int32]
Steps = Generator[int, None, T]
"""An exchange with a source. Yields how many bytes it reads next, before it waits for them; returns its result."""

MAX_PULLS = 64
"""Pulls at a time; more wait, within their deadline."""
MAX_IDLE_PER_PEER = 4
SMALL_BYTES = 64 << 10
"""A pull of so little is over sooner than a thread for it has begun: it is tried on the event loop first."""
PATIENCE_S = 300e-6
"""So long the loop waits for the answers to a small pull, all of them together, before a thread goes on with it."""


class SocketReceiver(ABC):
    """Pulls into a pool. Connections to a peer are kept for the next pull, and dropped after any error.

    How the bytes get here is the subclass's.
    """

    group_bytes: int
    """What is moved at a time where nothing is configured or known about the link."""
    inline_bytes = 0
    """Up to so many come through the socket in any case."""
    on_loop_bytes = SMALL_BYTES
    """Up to so many are taken on the event loop."""
    streams = False
    """Whether all others do, too."""

    def __init__(self, memory: Memory, *, digest: bool, silence_s: float, messages: MessagePlanner) -> None:
        self._messages = messages
        self._memory = memory
        self._digest = digest
        self._silence_s = silence_s
        self._threads = ThreadPoolExecutor(MAX_PULLS, "kv-pull")
        self._idle: dict[str, list[Wire]] = {}
        self._active: dict[Wire, asyncio.Future[Any]] = {}
        self._closed = False

    async def pull(self, asked: Pull) -> TransferResult:
        """See `KVTransferChannel.pull`. When it returns or raises, nobody writes to the target blocks any more."""
        memory = asked.into or self._memory()
        check_pull(memory, asked.source_blocks, asked.target_blocks)
        began_s, count, deviation = time.monotonic(), len(asked.target_blocks), None
        num_bytes = count * memory.block_bytes
        if count:
            deviation = await self._run(
                asked.source,
                began_s + asked.timeout_s,
                lambda wire, until_s: self._transfer(wire, memory, asked, until_s),
                # Memory that is staged may have to be waited for: not on the event loop.
                small=isinstance(memory, KvRegion) and num_bytes <= self.on_loop_bytes and count <= SMALL_BLOCKS,
            )
        return TransferResult(num_bytes, time.monotonic() - began_s, count, deviation)

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        """See `KVTransferChannel.pull_along`, and `pull`."""
        memory, count = asked.into or self._memory(), len(asked.target_blocks)
        check_targets(memory, asked.target_blocks)
        seconds, deviation = 0.0, None
        if count:
            seconds, deviation = await self._run(
                asked.source,
                time.monotonic() + asked.timeout_s,
                lambda wire, _: self._transfer_along(wire, memory, asked),
                small=False,
            )
        return TransferResult(count * memory.block_bytes, seconds, count, deviation)

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

    @abstractmethod
    async def _connect(self, source: KvSource, deadline_s: float) -> Wire:
        """Raises OSError, TimeoutError, or a SageError that says why this source cannot be reached this way."""

    @abstractmethod
    def _take_accepted(self, wire: Wire, source: KvSource) -> Steps[None]:
        """Raises what the source refuses with."""

    @abstractmethod
    def _take_blocks(self, wire: Wire, memory: KvMemory, asked: Pull, group_blocks: int) -> Steps[None]:
        """What `SocketSource._send_blocks` sends, once accepted."""

    def _take_answer(self, wire: Wire) -> Steps[None]:
        """Raises what the source refuses with."""
        yield frames.ANSWER.size
        yield from expect_accepted(wire, wire.recv(frames.ANSWER.size))

    def _take_inline(self, wire: Wire, memory: KvMemory, asked: Pull, group_blocks: int) -> Steps[None]:
        """What `SocketSource._send_inline` sends, once accepted."""
        target_blocks, metered, digest_bytes = asked.target_blocks, meter.current(), DIGEST_BYTES if self._digest else 0
        actual, done = bytearray(len(target_blocks) * digest_bytes), 0
        tail = bytearray(len(actual) + len(frames.TRAILER))
        groups = [g[part] for g in frames.groups(target_blocks, group_blocks) for part in stretches(memory, g)]
        for n, group in enumerate(groups, start=1):
            last = tail if n == len(groups) else bytearray()
            yield len(group) * memory.block_bytes + len(last)
            with filling(memory, group) as into:
                taken = memoryview(actual)[done : done + len(group) * digest_bytes]
                digest_s = wire.recv_into(bytearray(), into, last, taken if self._digest else None)
            done += len(taken)
            metered.arrived(len(group) * memory.block_bytes, len(group))
            metered.digest_s += digest_s
        _check_end(bytes(actual), tail[: len(actual)], tail[len(actual) :], asked)

    def _took_soon(self, wire: Wire, memory: KvMemory, asked: Pull, until_s: float) -> bool:
        """Takes the whole answer in one go, as `_take_inline` would; False, and nothing is taken, if it is not here in
        time, or another one than all the blocks as they are."""
        if asked.encoding is not None or not isinstance(memory, KvRegion):
            return False
        count, size = len(asked.target_blocks), memory.block_bytes
        taken = wire.recv_soon(
            frames.ACCEPTED_ANSWER,
            memory.address,
            asked.target_blocks.tolist(),
            size,
            digest=self._digest,
            tail_bytes=len(frames.TRAILER),
            until_s=until_s,
        )
        if taken is None:
            return False
        failpoints.hit("receiver.pulling")
        metered = meter.current()
        metered.arrived(count * size, count)
        metered.digest_s += taken.digest_s
        _check_end(taken.actual, taken.told, taken.tail, asked)
        return True

    @abstractmethod
    def _take_segment(self, wire: Wire, source: KvSource, segment: Segment, into: Pieces, metered: PullMeter) -> None:
        """What `SocketSource._send_segment` sends, after the segment's header."""

    def _take_places(self, wire: Wire, segment: Segment, into: Pieces) -> Offsets:
        """Where in the source's memory the segment's units are: what `SocketSource._send_places` sends."""
        (count,) = frames.PIECES.unpack(wire.recv(frames.PIECES.size))
        expected = into.unit_sizes
        if count != len(expected):
            raise MalformedFrame(f"cut {segment} into {count} pieces, not {len(expected)}")
        offsets, sizes = frames.decode_pieces(wire.recv(16 * count))
        if not np.array_equal(sizes, expected):
            raise MalformedFrame(f"cut {segment} into pieces of other sizes")
        return offsets

    async def _run(
        self, source: KvSource, deadline_s: float, exchange: Callable[[Wire, float], Steps[T]], *, small: bool
    ) -> T:
        """`exchange` on a connection of its own; when this returns or raises, it has ended. It is told until when the
        event loop waits for it, if it is small, or 0.

        Raises PeerLost for whatever the connection may fail with.
        """
        try:
            return await self._exchange(source, deadline_s, exchange, small)
        except (OSError, EOFError, MalformedFrame) as err:
            raise PeerLost(
                f"transfer {source.transfer_id!r}: source {source.worker_id!r} at {source.data_address} "
                f"was lost: {err or 'it closed the connection'}"
            ) from err

    async def _exchange(
        self, source: KvSource, deadline_s: float, exchange: Callable[[Wire, float], Steps[T]], small: bool
    ) -> T:
        wire = await self._connection(source, deadline_s)
        if self._closed:
            wire.close()
            raise Draining("this worker's KV byte path is closed")
        wire.deadline_s = deadline_s
        until_s = time.monotonic() + PATIENCE_S if small else 0.0
        steps = exchange(wire, until_s)
        try:
            ended = _soon(steps, wire, until_s) if small else None
        except BaseException:
            wire.close()
            raise
        if ended is None:
            ended = await self._in_thread(wire, steps)
        self._keep(source.data_address, wire)
        return ended.value  # type: ignore[no-any-return]

    async def _in_thread(self, wire: Wire, steps: Steps[T]) -> StopIteration:
        """What is left of the exchange, on a thread of its own."""
        job = asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, _to_the_end, steps)
        self._active[wire] = job
        try:
            return await asyncio.shield(job)
        except BaseException:
            wire.abort()
            await finished(job)
            wire.close()
            raise
        finally:
            del self._active[wire]

    def _transfer(self, wire: Wire, memory: KvMemory, asked: Pull, until_s: float) -> Steps[Deviation | None]:
        """The whole exchange of a pull."""
        source, count, size = asked.source, len(asked.target_blocks), memory.block_bytes
        inline, most = count * size <= self.inline_bytes, frames.max_group_blocks(size)
        default = self.group_bytes if in_place(memory) else frames.GROUP_BYTES
        plan = self._messages.plan(source, count, size, default_bytes=default, max_blocks=most)
        wire.send(
            frames.encode_pull(
                source.transfer_id,
                source.epoch,
                asked.source_blocks,
                block_bytes=size,
                digest=self._digest,
                timeout_s=wire.deadline_s - time.monotonic(),
                encoding=asked.encoding,
                group_blocks=plan.blocks_per_message,
                inline=inline,
            )
        )
        if until_s and (inline or self.streams) and self._took_soon(wire, memory, asked, until_s):
            return None
        yield from self._take_answer(wire) if inline else self._take_accepted(wire, source)
        failpoints.hit("receiver.pulling")
        take = self._take_inline if inline else self._take_blocks
        yield from take(wire, memory, asked, plan.blocks_per_message)
        return (yield from _deviation(wire, asked.encoding))

    def _transfer_along(self, wire: Wire, memory: KvMemory, asked: PullAlong) -> Steps[tuple[float, Deviation | None]]:
        """The whole exchange of a pull along; returns the seconds in which bytes moved, too."""
        source, count, num_layers, metered = (
            asked.source,
            len(asked.target_blocks),
            layers_apart(memory),
            meter.current(),
        )
        wire.send(
            frames.encode_along(
                source.transfer_id,
                source.epoch,
                asked.first_block,
                count,
                num_layers,
                block_bytes=memory.block_bytes,
                digest=self._digest,
                timeout_s=wire.deadline_s - time.monotonic(),
                encoding=asked.encoding,
            )
        )
        yield from self._take_accepted(wire, source)
        layers_here, seconds = np.zeros(count, dtype=np.int32), 0.0
        while True:
            yield frames.SEGMENT.size
            kind, segment = frames.decode_segment(wire.recv(frames.SEGMENT.size))
            if kind == frames.SEGMENT_DONE:
                break
            if kind == frames.SEGMENT_WAIT:
                metered.waited()
            if kind == frames.SEGMENT_FAILED:
                yield from expect_accepted(wire, wire.recv(frames.ANSWER.size))
            if kind == frames.SEGMENT_DATA:
                began_s = time.monotonic()
                here = _next_layers(layers_here, segment, asked.first_block, num_layers)
                with _filling(memory, asked.target_blocks[here], segment, num_layers) as into:
                    self._take_segment(wire, source, segment, into, metered)
                asked.on_bytes(into.num_bytes)
                seconds += time.monotonic() - began_s
                failpoints.hit("receiver.pulling")
        if (layers_here != num_layers).any():
            raise MalformedFrame("ended before all blocks were sent")
        return seconds, (yield from _deviation(wire, asked.encoding))

    async def _connection(self, source: KvSource, deadline_s: float) -> Wire:
        """An idle connection to the peer that is still good, or a new one. Raises as `_connect`."""
        idle = self._idle.get(source.data_address, [])
        while idle:
            wire = idle.pop()
            if not wire.readable(0):
                return wire
            wire.close()
        self._drop_stale()
        return await self._connect(source, min(time.monotonic() + self._silence_s, deadline_s))

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


@contextlib.contextmanager
def _filling(memory: KvMemory, block_ids: BlockIds, segment: Segment, num_layers: int) -> Iterator[Pieces]:
    """Where the segment's bytes go."""
    if segment.num_layers == num_layers:
        with filling(memory, block_ids) as pieces:
            yield pieces
    else:
        with memory.writing(block_ids) as (region, ids):
            yield of_segment(region, ids, segment, num_layers)


def _check_end(actual: bytes, told: bytes | bytearray, trailer: bytes | bytearray, asked: Pull) -> None:
    """Of blocks that arrived with these digests. Raises KvCorrupt, MalformedFrame."""
    if trailer != frames.TRAILER:
        raise MalformedFrame(f"ended with {bytes(trailer)!r}")
    verify_digests(actual, told, asked.target_blocks, asked.source.transfer_id)


def _deviation(wire: Wire, encoding: Encoding | None) -> Steps[Deviation | None]:
    """What ends a transfer in another dtype than the source's."""
    if encoding is None:
        return None
    yield frames.DEVIATION.size
    return frames.decode_deviation(wire.recv(frames.DEVIATION.size))


def _next_layers(layers_here: IntArray, segment: Segment, first_block: int, num_layers: int) -> slice:
    """Which of the blocks asked for the segment is of; counts it. Raises MalformedFrame unless it is what was missing
    next in each of them: then nothing is written outside them, or twice."""
    here = slice(segment.first_block - first_block, segment.end_block - first_block)
    inside = 0 <= here.start < here.stop <= len(layers_here) and segment.end_layer <= num_layers
    if not inside or segment.num_layers < 1 or (layers_here[here] != segment.first_layer).any():
        raise MalformedFrame(f"sent {segment} out of turn")
    layers_here[here] = segment.end_layer
    return here


def _to_the_end(steps: Steps[T]) -> StopIteration:
    """As a value: a future cannot be given a StopIteration to raise."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end


def _soon(steps: Steps[T], wire: Wire, until_s: float) -> StopIteration | None:
    """`steps` to the end, if that is reached by `until_s`; None when somebody with more time must go on."""
    try:
        while True:
            if not wire.has_soon(next(steps), until_s):
                return None
    except StopIteration as end:
        return end


def expect_accepted(wire: Wire, answer: bytes | bytearray) -> Steps[None]:
    """Raises what the source refuses with, or MalformedFrame."""
    accepted, reason_bytes, message_bytes = frames.decode_answer(answer)
    if not accepted:
        yield reason_bytes + message_bytes
        reason = wire.recv(reason_bytes).decode(errors="replace")
        raise error_for(reason, wire.recv(message_bytes).decode(errors="replace"))
