"""Byte paths of torch.distributed: each pull is a KvTransferService.Pull call, and beside it the bytes on a pair of two
processes, joined when they first need one.

    receiver  pull ──┬── pull_rpc(blocks, pair_id) ──────────► serve_pull: lease, join the pair, send ──► digests
                     └── join the pair, receive ◄──────────────────────────────────┘

The call tells at once what torch tells only when its timeout is up: that the source died, or refuses.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.comm_backend import meter
from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.torch_pair import (
    MESSAGE_BYTES,
    RECEIVER,
    SOURCE,
    Staging,
    TorchPair,
    join,
)
from sagellm_common.comm_backend.backends.torch_store import open_store
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.daemon import in_daemon_thread
from sagellm_common.comm_backend.integrity import check_pull, verify_digests
from sagellm_common.comm_backend.protocol import (
    LeasedBlocks,
    Memory,
    Pull,
    PullAlong,
    PullRpc,
    TransferResult,
    check_encoding,
)
from sagellm_common.comm_backend.write_gate import WriteGate
from sagellm_common.core.errors import ConfigError, DeadlineExceeded, Draining, InvalidRequest, PeerLost
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource

MAX_SOURCE_PAIRS = 64
"""Beyond these the longest unused one goes; its receiver makes a new one when it pulls again."""

REASON_GRACE_S = 1.0
"""How long a receiver whose pair broke waits to hear why."""

Peer = tuple[str, str, int, int]
"""(data address, incarnation, bytes of a message, messages under way)"""


def open_pairs(name: str, end: End, staging: Staging) -> PairChannel:
    """Raises ConfigError without `pull_rpc`, for the source has to act for each pull."""
    if end.pull_rpc is None:
        raise ConfigError(f"transport.backend={name} needs a pull_rpc: the source takes part in each pull")
    cfg = end.config
    return PairChannel(
        name,
        staging,
        end.ask,
        end.leases,
        end.host,
        end.port,
        end.pull_rpc,
        digest=cfg.digest,
        silence_s=cfg.timeout_s,
        settings=end.planner().settings,
    )


class PairChannel:
    """A `KVTransferChannel`. `silence_s` bounds each wait for a peer, a pull's own timeout the whole of it."""

    pulls_along = False
    encodes = False

    def __init__(
        self,
        name: str,
        staging: Staging,
        memory: Memory,
        leases: LeasedBlocks,
        host: str,
        port: int,
        pull_rpc: PullRpc,
        *,
        digest: bool,
        silence_s: float,
        settings: KVTransportConfig,
    ) -> None:
        self.name = name
        self.address = ""
        self._staging = staging
        self._settings = settings
        self._memory = memory
        self._leases = leases
        self._host, self._port = host, port
        self._pull_rpc = pull_rpc
        self._digest = digest
        self._silence_s = silence_s
        self._store: TCPStore | None = None
        self._closed = False
        self._idle: dict[Peer, list[tuple[str, TorchPair]]] = {}
        """Receiver's ends, by source, with their pair ids."""
        self._serving: OrderedDict[str, TorchPair] = OrderedDict()
        """Source's ends that no transfer uses just now."""
        self._lock = threading.Lock()

    async def start(self) -> str:
        """Raises ConfigError when the port cannot be had."""
        self._store, self.address = open_store(self._host, self._port, self._silence_s, "KV byte path")
        return self.address

    async def close(self) -> None:
        self._closed = True
        self._idle.clear()
        with self._lock:
            self._serving.clear()
        self._store = None

    # ---- receiver ----

    async def pull(self, asked: Pull) -> TransferResult:
        check_encoding(self, asked)
        memory, source, target_blocks = asked.into or self._memory(), asked.source, asked.target_blocks
        check_pull(memory, asked.source_blocks, target_blocks)
        if self._closed:
            raise Draining("this worker's KV byte path is closed")
        began_s = time.monotonic()
        if len(target_blocks):
            try:
                async with asyncio.timeout(asked.timeout_s):
                    await self._pull(memory, asked)
            except (TimeoutError, DeadlineExceeded) as err:
                raise PeerLost(
                    f"transfer {source.transfer_id!r}: source {source.worker_id!r} was silent for {asked.timeout_s:g} s"
                ) from err
        num_bytes = len(target_blocks) * memory.block_bytes
        return TransferResult(num_bytes, time.monotonic() - began_s, len(target_blocks))

    async def _pull(self, memory: KvMemory, asked: Pull) -> None:
        source, timeout_s = asked.source, asked.timeout_s
        sizes = self._message_sizes()
        peer = (source.data_address, source.incarnation, *sizes)
        pair_id, pair = self._idle[peer].pop() if self._idle.get(peer) else (uuid.uuid4().hex, None)
        write, metered = WriteGate(), meter.current()

        wait_s = min(timeout_s, self._silence_s)

        def receive() -> tuple[TorchPair, bytes]:
            joined = pair or join(
                self._staging,
                source.data_address,
                pair_id,
                RECEIVER,
                self._host,
                memory.block_bytes,
                wait_s,
                *sizes,
            )
            return joined, joined.recv(memory, asked.target_blocks, wait_s, write, metered, digest=self._digest)

        received = in_daemon_thread(f"kv-{self.name}-recv", receive)
        call = asyncio.ensure_future(self._pull_rpc(source, asked.source_blocks, pair_id, timeout_s))
        try:
            both: set[asyncio.Future[Any]] = {received, call}
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            if not call.done():
                # No bytes any more: the source refused, which its answer explains, or it died.
                await asyncio.wait([call], timeout=REASON_GRACE_S)
            if call.done():
                call.result()
            used, actual = await _lost_as_peer_lost(received, source)
            told = await call
        finally:
            write.shut()
            await _cancelled(call)
            received.add_done_callback(_retrieve)
        if self._digest:
            verify_digests(actual, told, asked.target_blocks, source.transfer_id)
        self._keep(peer, pair_id, used)

    def _message_sizes(self) -> tuple[int, int]:
        """(bytes of a message, messages under way) of a pair that is made now."""
        now = self._settings.now
        return now.chunk_bytes or MESSAGE_BYTES, now.pipeline_depth

    def _keep(self, peer: Peer, pair_id: str, pair: TorchPair) -> None:
        for other in [other for other in self._idle if other[0] == peer[0] and other != peer]:
            del self._idle[other]
        if not self._closed:
            self._idle.setdefault(peer, []).append((pair_id, pair))

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        raise InvalidRequest(
            f"over {self.name} nothing is pulled along the computation: a pair moves whole blocks, once they are all "
            "computed"
        )

    # ---- source ----

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        if not pair_id:
            raise InvalidRequest(f"pair_id is empty: a pull over {self.name} names the pair that the receiver has made")
        if self._closed or not self.address:
            raise Draining("this worker's KV byte path is closed")
        # On after a cancellation too: the lease is held until nothing of it is read any more.
        return await asyncio.shield(
            in_daemon_thread(f"kv-{self.name}-send", lambda: self._serve(transfer_id, epoch, block_ids, pair_id))
        )

    def _serve(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        """The source's part of one pull. After an error the pair is dropped, which ends the receiver's wait."""
        memory = self._memory()
        with self._lock:
            pair = self._serving.pop(pair_id, None)
        # Joined before anything is checked: a receiver that is refused must not be left waiting for its pair.
        pair = pair or join(
            self._staging,
            self.address,
            pair_id,
            SOURCE,
            self._host,
            memory.block_bytes,
            self._silence_s,
            *self._message_sizes(),
        )
        with self._leases.reading(transfer_id, epoch, block_ids):
            try:
                digests = pair.send(memory, block_ids, self._silence_s, digest=self._digest)
            except RuntimeError as err:
                raise PeerLost(f"transfer {transfer_id!r}: the receiver was lost: {err}") from err
        with self._lock:
            if not self._closed:
                self._serving[pair_id] = pair
            while len(self._serving) > MAX_SOURCE_PAIRS:
                self._serving.popitem(last=False)
        return digests


async def _lost_as_peer_lost(
    received: asyncio.Future[tuple[TorchPair, bytes]], source: KvSource
) -> tuple[TorchPair, bytes]:
    try:
        return await received
    except RuntimeError as err:
        raise PeerLost(
            f"transfer {source.transfer_id!r}: source {source.worker_id!r} at {source.data_address} was lost: {err}"
        ) from err


async def _cancelled(task: asyncio.Future[bytes]) -> None:
    """Ends the call, if it runs still, and waits for that."""
    task.cancel()
    await asyncio.wait([task])
    _retrieve(task)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """An error that nobody needs any more has been seen."""
    if not future.cancelled():
        future.exception()
