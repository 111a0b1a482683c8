"""Source side of the shm byte path: shows its memory, and holds the blocks until they are copied."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends.shm_address import own_address
from sagellm_common.comm_backend.backends.socket_source import SocketSource, expect_copied, send_places
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.frames import MalformedFrame, PullHeader
from sagellm_common.comm_backend.integrity import block_digests
from sagellm_common.comm_backend.pieces import Pieces, address_of
from sagellm_common.comm_backend.protocol import LeasedBlocks
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core import failpoints
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds


class ShmSource(SocketSource):
    def __init__(
        self, memory: Callable[[], KvRegion], leases: LeasedBlocks, silence_s: float, settings: KVTransportConfig
    ) -> None:
        super().__init__(memory, leases, silence_s, settings)
        self._shown: weakref.WeakKeyDictionary[Wire, int] = weakref.WeakKeyDictionary()
        """Which memory a receiver has been given the file of."""

    def _listen(self) -> tuple[socket.socket, str]:
        address = own_address()
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(address.socket_name)
            listener.listen(128)
        except OSError as err:
            listener.close()
            raise ConfigError(f"KV byte path cannot listen on a Unix socket: {err.strerror}; use tcp") from err
        return listener, str(address)

    def _admit(self, wire: Wire) -> str:
        """Whoever is of the same user could read our memory anyway."""
        pid, uid = wire.peer_credentials()
        if uid != os.geteuid():
            raise MalformedFrame(f"comes from user {uid}, not from {os.geteuid()}")
        return f"process {pid}"

    def _send_accepted(self, wire: Wire, memory: KvMemory) -> None:
        assert isinstance(memory, KvRegion)
        if memory.descriptor is None:
            shown = frames.MEMORY.pack(frames.MEMORY_ADDRESS, 0, len(memory.view), address_of(memory.view))
            wire.send(frames.encode_accepted() + shown)
            return
        memory_id = os.fstat(memory.descriptor).st_ino
        answer = frames.encode_accepted() + frames.MEMORY.pack(frames.MEMORY_FILE, memory_id, len(memory.view), 0)
        if self._shown.get(wire) == memory_id:
            wire.send(answer)
        else:
            wire.send_descriptors(answer, [memory.descriptor])
            self._shown[wire] = memory_id

    def _send_blocks(self, wire: Wire, memory: KvMemory, header: PullHeader, block_ids: BlockIds) -> None:
        """Digests are taken while the receiver copies."""
        assert isinstance(memory, KvRegion)
        self._send_accepted(wire, memory)
        digests = []
        groups = frames.groups(block_ids, header.group_blocks)
        for group in groups:
            if wire.closed_by_peer():
                raise ConnectionResetError("it closed the connection")
            if header.digest:
                with meter.source_digesting():
                    digests.append(block_digests(memory, group))
            failpoints.hit("source.sending")
        expect_copied(wire, len(groups))
        wire.send(b"".join(digests) + frames.TRAILER)

    def _send_segment(self, wire: Wire, segment: Segment, pieces: Pieces, *, digest: bool) -> None:
        send_places(wire, segment, pieces, digest=digest)
