"""Receiver side of the shm byte path: copies out of the source's memory into its own."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import weakref
from collections.abc import Callable

import numpy as np

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends.peer_memory import MappedMemory, PeerMemory, ProcessMemory
from sagellm_common.comm_backend.backends.shm_address import reachable_address
from sagellm_common.comm_backend.backends.socket_receiver import SMALL_BYTES, SocketReceiver, Steps, expect_accepted
from sagellm_common.comm_backend.bridge import filling, stretches
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.integrity import DIGEST_BYTES, digest_of, verify_digests, verify_segment
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import Pieces
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import KvSource

RETRY_S = 0.002


class ShmReceiver(SocketReceiver):
    """Up to `inline_bytes` come through the socket: one round trip, not the two of being shown blocks and giving them
    back."""

    group_bytes = frames.IN_PLACE_GROUP_BYTES

    def __init__(
        self,
        memory: Callable[[], KvRegion],
        *,
        digest: bool,
        silence_s: float,
        messages: MessagePlanner,
        inline_bytes: int = SMALL_BYTES,
    ) -> None:
        self.inline_bytes = inline_bytes
        super().__init__(memory, digest=digest, silence_s=silence_s, messages=messages)
        self._mapped: weakref.WeakValueDictionary[tuple[str, int], MappedMemory] = weakref.WeakValueDictionary()
        """By the source's address, which no other process will ever have, and the memory's id there. Kept by wires."""
        self._peers: weakref.WeakKeyDictionary[Wire, PeerMemory] = weakref.WeakKeyDictionary()

    async def _connect(self, source: KvSource, deadline_s: float) -> Wire:
        address = reachable_address(source)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(address.socket_name)
                    break
                except BlockingIOError:  # its backlog is full, and nobody tells when it no longer is
                    if time.monotonic() + RETRY_S > deadline_s:
                        raise TimeoutError("it accepts no connection") from None
                    await asyncio.sleep(RETRY_S)
            wire = Wire(sock, self._silence_s)
            wire.peer_pid, uid = wire.peer_credentials()
            if uid != os.geteuid():
                raise PeerLost(f"source {source.worker_id!r} at {source.data_address} runs as user {uid}, not as ours")
        except BaseException:
            sock.close()
            raise
        return wire

    def _take_accepted(self, wire: Wire, source: KvSource) -> Steps[None]:
        yield frames.ANSWER.size
        answer, descriptors = wire.recv_descriptors(frames.ANSWER.size)
        try:
            yield from expect_accepted(wire, answer)
            yield frames.MEMORY.size
            kind, memory_id, num_bytes, address = frames.MEMORY.unpack(wire.recv(frames.MEMORY.size))
            if kind == frames.MEMORY_FILE:
                self._peers[wire] = self._map(source, memory_id, num_bytes, descriptors)
            elif kind == frames.MEMORY_ADDRESS:
                self._peers[wire] = ProcessMemory(source.worker_id, wire.peer_credentials()[0], address, num_bytes)
            else:
                raise MalformedFrame(f"shows memory of kind {kind}")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _map(self, source: KvSource, memory_id: int, num_bytes: int, descriptors: list[int]) -> MappedMemory:
        """Once for all connections to this incarnation of the source."""
        key = (source.data_address, memory_id)
        mapped = self._mapped.get(key)
        if mapped is None:
            if len(descriptors) != 1:
                raise MalformedFrame(f"shows {len(descriptors)} files for a memory not seen before")
            mapped = self._mapped[key] = MappedMemory(descriptors[0], num_bytes)
        return mapped

    def _take_blocks(self, wire: Wire, memory: KvMemory, asked: Pull, group_blocks: int) -> Steps[None]:
        peer, size, metered = self._peers[wire], memory.block_bytes, meter.current()
        groups = [frames.groups(ids, group_blocks) for ids in (asked.source_blocks, asked.target_blocks)]
        actual = []
        for from_blocks, to_blocks in zip(*groups, strict=True):
            if wire.readable(0):
                raise ConnectionResetError("it gave the blocks up before they were copied")
            wire.check_peer()
            begins = from_blocks.astype(np.int64) * size
            for part in stretches(memory, to_blocks):
                with filling(memory, to_blocks[part]) as into:
                    actual.append(peer.copy(into.within_units(begins[part]), into, digest=self._digest))
            metered.arrived(len(to_blocks) * size, len(to_blocks))
            wire.send(frames.COPIED)
        expected_bytes = len(asked.target_blocks) * DIGEST_BYTES if self._digest else 0
        yield expected_bytes + len(frames.TRAILER)
        told = wire.recv(expected_bytes + len(frames.TRAILER))
        if told[expected_bytes:] != frames.TRAILER:
            raise MalformedFrame(f"ended with {bytes(told[expected_bytes:])!r}")
        verify_digests(b"".join(actual), told[:expected_bytes], asked.target_blocks, asked.source.transfer_id)

    def _take_segment(self, wire: Wire, source: KvSource, segment: Segment, into: Pieces, metered: PullMeter) -> None:
        offsets = self._take_places(wire, segment, into)
        actual = self._peers[wire].copy(into.within_units(offsets), into, digest=self._digest)
        metered.arrived(into.num_bytes)
        wire.send(frames.COPIED)
        # Not before it says so may the copy be believed, digest or not.
        expected = wire.recv(DIGEST_BYTES)
        if self._digest:
            verify_segment(segment, digest_of(actual), expected, source.transfer_id)
