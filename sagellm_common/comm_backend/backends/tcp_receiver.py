"""Receiver side of the TCP byte path: fills its own blocks straight from the socket, where the host can reach them."""

from __future__ import annotations

import asyncio
import socket
import time

from sagellm_common.comm_backend import frames
from sagellm_common.comm_backend.backends.socket_receiver import SocketReceiver, Steps
from sagellm_common.comm_backend.integrity import (
    DIGEST_BYTES,
    segment_digest,
    verify_segment,
)
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import Pieces
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire, split_address
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import KvSource


class TcpReceiver(SocketReceiver):
    group_bytes = frames.IN_PLACE_GROUP_BYTES
    streams = True

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
        yield from self._take_answer(wire)

    def _take_blocks(self, wire: Wire, memory: KvMemory, asked: Pull, group_blocks: int) -> Steps[None]:
        yield from self._take_inline(wire, memory, asked, group_blocks)

    def _take_segment(self, wire: Wire, source: KvSource, segment: Segment, into: Pieces, metered: PullMeter) -> None:
        digest = bytearray(DIGEST_BYTES if self._digest else 0)
        wire.recv_into(digest, into)
        metered.arrived(into.num_bytes, segment.num_blocks)
        if self._digest:
            with metered.digesting():
                verify_segment(segment, segment_digest(into), digest, source.transfer_id)
