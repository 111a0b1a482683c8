"""Receiver side of the TCP byte path: fills its own blocks straight from the socket, where the host can reach them."""

from __future__ import annotations

import asyncio
import socket
import time

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends.socket_receiver import SocketReceiver, Steps, expect_accepted
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.integrity import (
    DIGEST_BYTES,
    segment_digest,
    verify_digests,
    verify_segment,
)
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import Pieces, blocks
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire, split_address
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource


class TcpReceiver(SocketReceiver):
    group_bytes = frames.GROUP_BYTES

    async def _connect(self, source: KvSource, deadline_s: float) -> Wire:
        try:
            host, port = split_address(source.data_address)
        except ValueError as err:
            raise PeerLost(f"KV source: {err}") from err
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        return Wire(sock, self._silence_s)

    def _take_accepted(self, wire: Wire, source: KvSource) -> Steps[None]:
        yield frames.ANSWER.size
        yield from expect_accepted(wire, wire.recv(frames.ANSWER.size))

    def _take_blocks(
        self,
        wire: Wire,
        memory: KvMemory,
        source: KvSource,
        source_blocks: BlockIds,
        target_blocks: BlockIds,
        group_blocks: int,
    ) -> Steps[None]:
        metered, digest_bytes = meter.current(), DIGEST_BYTES if self._digest else 0
        actual, done = bytearray(len(target_blocks) * digest_bytes), 0
        tail = bytearray(len(actual) + len(frames.TRAILER))
        groups = frames.groups(target_blocks, group_blocks)
        for n, group in enumerate(groups, start=1):
            last = tail if n == len(groups) else bytearray()
            yield len(group) * memory.block_bytes + len(last)
            with memory.writing(group) as (region, ids):
                taken = memoryview(actual)[done : done + len(ids) * digest_bytes]
                digest_s = wire.recv_into(bytearray(), blocks(region, ids), last, taken if self._digest else None)
            done += len(taken)
            metered.arrived(len(group) * memory.block_bytes, len(group))
            metered.digest_s += digest_s
        told, trailer = tail[: len(actual)], tail[len(actual) :]
        if trailer != frames.TRAILER:
            raise MalformedFrame(f"ended with {bytes(trailer)!r}")
        verify_digests(bytes(actual), told, target_blocks, source.transfer_id)

    def _take_segment(self, wire: Wire, source: KvSource, segment: Segment, into: Pieces, metered: PullMeter) -> None:
        digest = bytearray(DIGEST_BYTES if self._digest else 0)
        wire.recv_into(digest, into)
        metered.arrived(into.num_bytes, segment.num_blocks)
        if self._digest:
            with metered.digesting():
                verify_segment(segment, segment_digest(into), digest, source.transfer_id)
