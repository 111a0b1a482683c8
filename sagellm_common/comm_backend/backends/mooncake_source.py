"""Source side of the Mooncake byte path: says where the blocks are and holds them while the receiver reads.

In the answer to a pull there are no blocks but the place of the pool:

    receiver → source   request (frames.encode_pull)
    source → receiver   accepted, READING, the engine's name; then the digests of all blocks, if asked for
    receiver → source   one byte for each group of blocks that it has read, another one when it has them all
    source → receiver   trailer: the lease was held until here

Along the computation each segment is answered so: where its pieces are, then, when they are read, its digest.

The connection is the receiver's hold on the lease: when it breaks, or is silent for too long, the blocks are free.
"""

from __future__ import annotations

import contextlib
import struct
import threading

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends.mooncake_engine import Engine, address_of
from sagellm_common.comm_backend.backends.socket_source import send_places
from sagellm_common.comm_backend.backends.tcp_source import TcpSource
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.frames import MalformedFrame, PullHeader
from sagellm_common.comm_backend.integrity import block_digests
from sagellm_common.comm_backend.pieces import Pieces
from sagellm_common.comm_backend.protocol import LeasedBlocks, Regions
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core import failpoints
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds

READING = struct.Struct("<HQ")
"""Bytes of the engine's name; address of block 0 in the source."""
GROUP_READ, ALL_READ = b"g", b"a"


class MooncakeSource(TcpSource):
    """Serves pulls by letting receivers read."""

    def __init__(
        self,
        regions: Regions,
        leases: LeasedBlocks,
        silence_s: float,
        host: str,
        port: int,
        engine: Engine,
        settings: KVTransportConfig,
    ) -> None:
        super().__init__(regions, leases, silence_s, host, port, settings)
        self._regions = regions
        self._engine = engine
        self._exposed: tuple[int, int] | None = None
        """(address, bytes) that peers can read."""
        self._expose_lock = threading.Lock()

    def close(self, timeout_s: float = 5.0) -> None:
        super().close(timeout_s)
        self._expose(None)

    def _expose(self, region: KvRegion | None) -> int:
        """Lets peers read this region and no other; returns the address of its block 0. Raises ConfigError.

        A store's region comes, and changes, with its layout.
        """
        wanted = None if region is None else (address_of(region.view), len(region.view))
        with self._expose_lock:
            if wanted != self._exposed:
                if self._exposed is not None:
                    self._engine.unserve(self._exposed[0])
                    self._exposed = None
                if wanted is not None:
                    self._engine.serve(*wanted)
                    self._exposed = wanted
        return 0 if wanted is None else wanted[0]

    def _answer(self, wire: Wire, header: PullHeader, transfer_id: str, block_ids: BlockIds) -> None:
        with contextlib.ExitStack() as held:
            try:
                self._readable(header, transfer_id, int(block_ids[-1]))
                region = self._regions()
                held.enter_context(self._leases.reading(transfer_id, header.epoch, block_ids))
                address = self._expose(region)
            except SageError as err:
                wire.send(frames.encode_refusal(err.reason, err.message))
                return
            head = self._accepted(address)
            for group in frames.groups(block_ids, header.group_blocks):
                # The first of them before the receiver can read: what it reads is what was there then, or is noticed.
                if header.digest:
                    with meter.source_digesting():
                        head += block_digests(region, group)
                wire.send(head)
                head = b""
                failpoints.hit("source.sending")
            while (said := bytes(wire.recv(1))) == GROUP_READ:
                pass
            if said != ALL_READ:
                raise MalformedFrame(f"ended a read with {said!r}")
            wire.send(frames.TRAILER)

    def _accepted(self, address: int) -> bytes:
        session = self._engine.session.encode()
        return frames.encode_accepted() + READING.pack(len(session), address) + session

    def _send_accepted(self, wire: Wire, memory: KvMemory) -> None:
        wire.send(self._accepted(self._expose(self._regions())))

    def _send_segment(self, wire: Wire, segment: Segment, pieces: Pieces, *, digest: bool) -> None:
        send_places(wire, segment, pieces, digest=digest)
