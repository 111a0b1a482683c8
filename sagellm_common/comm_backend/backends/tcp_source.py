"""Source side of the TCP byte path: blocks go out of KV memory into the socket, a group with one system call."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

from sagellm_common.comm_backend import frames
from sagellm_common.comm_backend.backends.socket_source import SocketSource, deviation_of
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.frames import PullHeader
from sagellm_common.comm_backend.integrity import block_digests, segment_digest
from sagellm_common.comm_backend.pieces import Pieces, blocks
from sagellm_common.comm_backend.protocol import Encode, LeasedBlocks, Memory
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core import failpoints
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds

BESIDE_BYTES = 256 << 10
"""Less is digested before another thread has begun to."""


class TcpSource(SocketSource):
    """Listens on host:port (0: any)."""

    def __init__(
        self,
        memory: Memory,
        leases: LeasedBlocks,
        silence_s: float,
        host: str,
        port: int,
        settings: KVTransportConfig,
        encode: Encode | None = None,
    ) -> None:
        super().__init__(memory, leases, silence_s, settings, encode)
        self._digesting = ThreadPoolExecutor(os.cpu_count(), "kv-digest")
        """Blocks are digested while they are sent."""
        self._host, self._port = host, port

    def _listen(self) -> tuple[socket.socket, str]:
        try:
            listener = socket.create_server((self._host, self._port), backlog=128)
        except OSError as err:
            raise ConfigError(
                f"KV byte path cannot listen on {self._host}:{self._port}: {err.strerror}; choose another port"
            ) from err
        return listener, f"{self._host}:{listener.getsockname()[1]}"

    def _admit(self, wire: Wire) -> str:
        return wire.peer_address()

    def _send_accepted(self, wire: Wire, memory: KvMemory) -> None:
        wire.send(frames.encode_accepted())

    def close(self, timeout_s: float = 5.0) -> None:
        super().close(timeout_s)
        self._digesting.shutdown(wait=False)

    def _send_blocks(self, wire: Wire, memory: KvMemory, header: PullHeader, block_ids: BlockIds) -> None:
        head, digests = frames.encode_accepted(), b""
        groups = frames.groups(block_ids, header.group_blocks)
        for group in groups:
            with memory.reading(group) as (region, ids):
                pieces = blocks(region, ids)
                if len(groups) == 1 and pieces.num_bytes < BESIDE_BYTES:
                    # All in one system call; what is last has gone when all the rest has.
                    digests = block_digests(region, ids) if header.digest else b""
                    failpoints.hit("source.sending")
                    wire.send(head, pieces, digests + frames.TRAILER + deviation_of(memory))
                    return
                job = self._digesting.submit(block_digests, region, ids) if header.digest else None
                try:
                    wire.send(head, pieces)
                finally:
                    digests += job.result() if job else b""
            head = b""
            failpoints.hit("source.sending")
        wire.send(digests + frames.TRAILER + deviation_of(memory))

    def _send_segment(self, wire: Wire, segment: Segment, pieces: Pieces, *, digest: bool) -> None:
        head = frames.encode_segment(frames.SEGMENT_DATA, segment)
        wire.send(head + (segment_digest(pieces) if digest else b""), pieces)
