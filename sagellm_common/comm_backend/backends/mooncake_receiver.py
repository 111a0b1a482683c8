"""Receiver side of the Mooncake byte path: has its engine read the source's memory into staging slots."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Iterator

import numpy as np

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends.mooncake_engine import MAX_READS, SLOT_BYTES, Engine, Slot
from sagellm_common.comm_backend.backends.mooncake_source import ALL_READ, GROUP_READ, READING
from sagellm_common.comm_backend.backends.socket_receiver import Steps
from sagellm_common.comm_backend.backends.tcp_receiver import TcpReceiver
from sagellm_common.comm_backend.bridge import filling, stretches
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.integrity import DIGEST_BYTES, digest_of, verify_digests, verify_segment
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import Pieces, copy, in_order
from sagellm_common.comm_backend.protocol import Memory, Pull
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource

Reads = list[tuple[int, int]]
"""(address in the source, bytes)"""


class _SourceIsGone:
    """When to give reads up, as `Engine.reading` asks: the engine would notice late that nobody is there."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def is_set(self) -> bool:
        return self._wire.closed_by_peer()

    def wait(self, timeout_s: float) -> bool:
        time.sleep(timeout_s)
        return self.is_set()


class MooncakeReceiver(TcpReceiver):
    """A request is asked over a socket, as over tcp; nothing of the answer's blocks comes through it."""

    on_loop_bytes = 0
    streams = False

    def __init__(
        self, engine: Engine, memory: Memory, *, digest: bool, silence_s: float, messages: MessagePlanner
    ) -> None:
        super().__init__(memory, digest=digest, silence_s=silence_s, messages=messages)
        self._engine = engine
        self._sources: weakref.WeakKeyDictionary[Wire, tuple[str, int]] = weakref.WeakKeyDictionary()
        """Of the exchange under way: the source's engine, and the address of its block 0."""

    def _take_accepted(self, wire: Wire, source: KvSource) -> Steps[None]:
        yield from self._take_answer(wire)
        name_bytes, address = READING.unpack(wire.recv(READING.size))
        self._sources[wire] = wire.recv(name_bytes).decode(errors="replace"), address

    def _take_blocks(self, wire: Wire, memory: KvMemory, asked: Pull, group_blocks: int) -> Steps[None]:
        """Group by group: one is copied to its blocks while the next is on its way."""
        peer, address = self._sources[wire]
        size, metered, gone = memory.block_bytes, meter.current(), _SourceIsGone(wire)
        groups = list(cut_in_groups(runs(address, asked.source_blocks, size), size))
        yield 0
        actual, told = [], bytearray()
        with self._engine.slots(size) as slots:
            here, end = slice(0, 0), 0
            for n, group in enumerate(groups):
                until_s = min(wire.deadline_s, time.monotonic() + self._silence_s)
                with self._engine.reading(peer, group, slots[n % 2], until_s, gone):
                    if n:
                        actual.append(self._fill(memory, asked.target_blocks[here], slots[(n + 1) % 2], metered))
                here = slice(end, end := end + sum(num_bytes for _, num_bytes in group) // size)
                wire.send(GROUP_READ)
                # Or the source would wait to tell more of them.
                told += wire.recv((here.stop - here.start) * DIGEST_BYTES if self._digest else 0)
            actual.append(self._fill(memory, asked.target_blocks[here], slots[(len(groups) - 1) % 2], metered))
        wire.send(ALL_READ)
        trailer = wire.recv(len(frames.TRAILER))
        if trailer != frames.TRAILER:
            raise MalformedFrame(f"ended with {bytes(trailer)!r}")
        verify_digests(b"".join(actual), told, asked.target_blocks, asked.source.transfer_id)

    def _fill(self, memory: KvMemory, block_ids: BlockIds, slot: Slot, metered: PullMeter) -> bytes:
        """The blocks that lie at the slot's beginning; returns their digests."""
        staged, found = in_order(slot.memory, len(block_ids), memory.block_bytes), []
        for part in stretches(memory, block_ids):
            with filling(memory, block_ids[part]) as into:
                found.append(_copy(staged[part], into, digest=self._digest))
        metered.arrived(len(block_ids) * memory.block_bytes, len(block_ids))
        return b"".join(found)

    def _take_segment(self, wire: Wire, source: KvSource, segment: Segment, into: Pieces, metered: PullMeter) -> None:
        peer, address = self._sources[wire]
        offsets = self._take_places(wire, segment, into)
        sizes = into.unit_sizes
        reads = list(zip((offsets + address).tolist(), sizes.tolist(), strict=True))
        until_s = min(wire.deadline_s, time.monotonic() + self._silence_s)
        with self._engine.slots(into.num_bytes) as (slot, _):
            with self._engine.reading(peer, reads, slot, until_s, _SourceIsGone(wire)):
                pass
            staged = Pieces(slot.memory, np.cumsum(sizes) - sizes, sizes)
            actual = _copy(staged, into, digest=self._digest)
        metered.arrived(into.num_bytes, segment.num_blocks)
        wire.send(frames.COPIED)
        # Not before it says so may what was read be believed, digest or not.
        expected = wire.recv(DIGEST_BYTES)
        if self._digest:
            verify_segment(segment, digest_of(actual), expected, source.transfer_id)


def _copy(staged: Pieces, into: Pieces, *, digest: bool) -> bytes:
    """Pieces that are units of `into` (see `Pieces`)."""
    return copy(Pieces(staged.memory, into.within_units(staged.offsets), into.sizes), into, digest=digest)


def runs(address: int, block_ids: BlockIds, size: int) -> Reads:
    """Where in the source's memory the blocks are, neighbours as one."""
    cuts = np.flatnonzero(np.diff(block_ids) != 1) + 1
    bounds = [0, *cuts.tolist(), len(block_ids)]
    return [(address + int(block_ids[a]) * size, (b - a) * size) for a, b in itertools.pairwise(bounds)]


def cut_in_groups(runs: Reads, size: int) -> Iterator[Reads]:
    """The runs in groups that fit a slot, of at most MAX_READS each; a long run is cut between blocks."""
    room_bytes = max(SLOT_BYTES // size, 1) * size
    group: Reads = []
    free = room_bytes
    for start, left in runs:
        while left:
            part = min(left, free)
            group.append((start, part))
            start, left, free = start + part, left - part, free - part
            if not free or len(group) == MAX_READS:
                yield group
                group, free = [], room_bytes
    if group:
        yield group
