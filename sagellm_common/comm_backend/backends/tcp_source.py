"""Source side of the TCP byte path: blocks go out of KV memory into the socket, a group with one system call."""

from __future__ import annotations

import socket

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends.socket_source import SocketSource
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.frames import PullHeader
from sagellm_common.comm_backend.integrity import segment_digest
from sagellm_common.comm_backend.pieces import Pieces
from sagellm_common.comm_backend.protocol import Encode, LeasedBlocks, Memory
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds


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

    def _send_blocks(self, wire: Wire, memory: KvMemory, header: PullHeader, block_ids: BlockIds) -> None:
        self._send_inline(wire, memory, header, block_ids)

    def _send_segment(self, wire: Wire, segment: Segment, pieces: Pieces, *, digest: bool) -> None:
        head = frames.encode_segment(frames.SEGMENT_DATA, segment)
        if digest:
            with meter.source_digesting():
                head += segment_digest(pieces)
        wire.send(head, pieces)
