"""What kv_store does: KV blocks of finished requests in host memory and on a disk below it, found by hash.

put   begin_put (blocks for what is absent) → pull from the source → commit_put, or abort_put in any other case
get   leading hits from the disk into memory → references on those there → pinned under a lease → the client pulls
      and releases, or the lease runs out
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sagellm_common.comm_backend.bridge import Buffers
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.token_pull import TokenPuller
from sagellm_common.comm_backend.transcode import check_bridgeable, obstacles
from sagellm_common.core import failpoints
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import BlockHash, KvLayout, KvSource, TokenIds, WorkerRecord
from sagellm_common.kv_runtime.backends.host import PendingPut
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.rpc.kv_transfer_service import check_backend
from sagellm_common.rpc.worker_service import Load
from services.kv_store.transcoded import conversion

FIRST_EPOCH = 1
PROMOTE_TIMEOUT_S = 0.25
"""What has not come up from the disk by then costs its hits: whoever asked computes meanwhile, or waits for us."""


@dataclass(frozen=True, slots=True)
class PutResult:
    num_stored: int
    num_present: int
    bytes_pulled: int


class Worker(Protocol):
    """What the store asks of the worker it runs in (`WorkerRuntime`)."""

    @property
    def record(self) -> WorkerRecord: ...

    def check_accepting(self) -> None:
        """Raises Draining once no new work is taken."""


class KvStore:
    """`kept_layouts` are those of which there are blocks on the disk, the last used first."""

    def __init__(
        self,
        pool: HierarchyManager,
        leases: HandoffSource,
        channel: PathsChannel,
        worker: Worker,
        kept_layouts: Callable[[], Sequence[KvLayout]] = tuple,
    ) -> None:
        self._pool = pool
        self._kept_layouts = kept_layouts
        self._leases = leases
        self._channel = channel
        self._worker = worker
        self._buffers = Buffers()
        self._running_puts = 0

    @property
    def incarnation(self) -> str:
        return self._worker.record.incarnation

    def load(self) -> Load:
        return Load(running_requests=self._running_puts, pinned_transfers=len(self._leases))

    async def settle(self, layout: KvLayout) -> None:
        """Goes on with what an earlier life left on the disk, where a worker with this layout can use it.

        Nothing happens where there is nothing, or a layout is settled. Raises ConfigError.
        """
        if not self._pool.settled:
            kept = next((kept for kept in self._kept_layouts() if not obstacles(kept, layout)), None)
            if kept is not None:
                await asyncio.to_thread(self._pool.adopt, kept)

    def lookup(self, hashes: Sequence[BlockHash], layout: KvLayout) -> tuple[int, KvLayout | None]:
        """How many leading hashes are stored, and the layout of all that is; None for nothing yet.

        With another layout than that nothing is found. Raises LayoutMismatch where it cannot be transcoded to either.
        """
        if not self._pool.regions().num_blocks:
            return 0, None
        mine = self._pool.layout
        check_bridgeable(mine, layout, self._worker.record.worker_id, "the caller")
        return self._pool.lookup(hashes) if mine == layout else 0, mine

    async def get(
        self, hashes: Sequence[BlockHash], token_ids: TokenIds, layout: KvLayout, backend: str
    ) -> KvSource | None:
        """The leading blocks stored for these tokens, pinned under a new lease; None for none.

        Raises InvalidRequest, LayoutMismatch, ConfigError (another byte path), Draining.
        """
        self._worker.check_accepting()
        check_backend(self._channel, backend)
        if not self._pool.check_layout(layout):
            return None
        if self._pool.below(hashes):
            await asyncio.to_thread(self._pool.promote, hashes, token_ids, PROMOTE_TIMEOUT_S)
        allocation = self._pool.get(hashes, token_ids)
        if not len(allocation.block_ids):
            self._pool.free(allocation)
            return None
        transfer_id = f"store:{secrets.token_hex(8)}"
        try:
            self._leases.pin(transfer_id, FIRST_EPOCH, allocation, allocation.num_cached_tokens)
        except BaseException:
            self._pool.free(allocation)
            raise
        failpoints.hit("store.getting")
        record = self._worker.record
        return KvSource(
            transfer_id=transfer_id,
            epoch=FIRST_EPOCH,
            worker_id=record.worker_id,
            incarnation=record.incarnation,
            control_address=record.address,
            data_address=self._channel.address,
            backend=self._channel.name,
            block_table=allocation.block_ids,
            num_tokens=allocation.num_cached_tokens,
            lease_expires_in_ms=int(self._leases.ttl_s * 1000),
            layers_ready=layout.num_layers,
            tokens_ready=allocation.num_cached_tokens,
            paths=self._channel.paths,
            conversion=conversion(self._pool.notes(hashes[: len(allocation.block_ids)])),
        )

    async def put(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        layout: KvLayout,
        source: KvSource,
        source_layout: KvLayout,
        timeout_s: float,
    ) -> PutResult:
        """Pulls what is absent from `source`, whose lease the caller holds. Stores fewer when memory is short.

        Hashes and tokens are those of blocks in `layout`, which the first put settles for all; those of the source,
        from the same token on, may be cut and kept in another way.

        Raises InvalidRequest, LayoutMismatch, ConfigError, Draining, and what `PullQueue.pull` raises.
        """
        self._worker.check_accepting()
        check_backend(self._channel, source.backend)
        offered = len(source.block_table) * source_layout.block_size_tokens
        if offered < len(hashes) * layout.block_size_tokens:
            raise InvalidRequest(
                f"source.block_table has {len(source.block_table)} blocks of {source_layout.block_size_tokens} tokens "
                f"for {len(hashes)} block hashes of {layout.block_size_tokens}"
            )
        check_bridgeable(layout, source_layout, self._worker.record.worker_id, source.worker_id)
        if self._pool.settled:
            self._pool.check_layout(layout)
        else:
            await asyncio.to_thread(self._pool.adopt, layout)  # may open files
        put = self._pool.begin_put(hashes, token_ids)
        self._running_puts += 1
        try:
            num_bytes = await self._pull(put, source, source_layout, timeout_s)
            failpoints.hit("store.putting")
            self._pool.commit_put(put)
        finally:
            # Whatever kept it from being committed: no one may find half-filled blocks.
            self._pool.abort_put(put)
            self._running_puts -= 1
        return PutResult(len(put.positions), put.num_present, num_bytes)

    async def _pull(self, put: PendingPut, source: KvSource, source_layout: KvLayout, timeout_s: float) -> int:
        """Fills the put's blocks, run by run of what was absent; returns the bytes that crossed."""
        deadline_s, num_bytes, size = time.monotonic() + timeout_s, 0, self._pool.layout.block_size_tokens
        tokens = TokenPuller(self._channel, self._pool.regions(), self._pool.layout, buffers=self._buffers)
        table = np.zeros(1 + put.positions.max(initial=-1), np.int32)
        table[put.positions] = put.allocation.block_ids
        for run in np.split(put.positions, np.flatnonzero(np.diff(put.positions) != 1) + 1):
            if len(run):
                begin, end = int(run[0]) * size, (int(run[-1]) + 1) * size
                left_s = deadline_s - time.monotonic()
                pulled = await tokens.pull(source, source_layout, table, begin, end, timeout_s=left_s)
                num_bytes += pulled.bytes
        return num_bytes

    def pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keeps blocks from eviction; returns how many."""
        return self._pool.pin(hashes, ttl_s)
