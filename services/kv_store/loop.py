"""What kv_store does: KV blocks of finished requests in host memory and on a disk below it, found by hash.

put   begin_put (blocks for what is absent) → pull from the source → commit_put, or abort_put in any other case
get   leading hits from the disk into memory → references on those there → pinned under a lease → the client pulls
      and releases, or the lease runs out
"""

from __future__ import annotations

import asyncio
import itertools
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
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvSource, TokenIds, WorkerRecord
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.kv_runtime.backends.host import PendingPut
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.prefix_reuse.sharding import Extent
from sagellm_common.rpc.kv_transfer_service import check_backend
from sagellm_common.rpc.worker_service import Load
from services.kv_store.extents import ExtentTable
from services.kv_store.replication import Replicator
from services.kv_store.transcoded import conversion

FIRST_EPOCH = 1
PROMOTE_TIMEOUT_S = 0.25
"""What has not come up from the disk by then costs its hits: whoever asked computes meanwhile, or waits for us."""
PIECE_BLOCKS = 512


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
        extents: ExtentTable,
        kept_layouts: Callable[[], Sequence[KvLayout]] = tuple,
        *,
        replicator: Replicator | None = None,
        pin_share: float = 1.0,
    ) -> None:
        self._pool = pool
        self._extents = extents
        self._replicator = replicator
        self._pin_share = pin_share
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
        giving = self._replicator is not None and self._replicator.busy
        return Load(running_requests=self._running_puts + giving, pinned_transfers=len(self._leases))

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

    def lookup_extents(self, hashes: Sequence[BlockHash], extents: Sequence[Extent], layout: KvLayout) -> list[int]:
        """How many leading blocks of each extent are stored; `hashes` are those of all of them, in order."""
        if not self._pool.regions().num_blocks or self._pool.layout != layout:
            return [0] * len(extents)
        ends = list(itertools.accumulate(extent.num_blocks for extent in extents))
        return [self._pool.lookup(hashes[end - e.num_blocks : end]) for e, end in zip(extents, ends, strict=True)]

    async def get(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        layout: KvLayout,
        backend: str,
        extents: Sequence[Extent] = (),
        contexts: Sequence[bytes] = (),
    ) -> KvSource | None:
        """The leading blocks stored for these tokens, pinned under a new lease; None for none.

        `contexts` (`prefix_reuse.matcher`) are the blocks', one for each or none; so they are of `put`.

        Raises InvalidRequest, LayoutMismatch, ConfigError (another byte path), Draining.
        """
        self._worker.check_accepting()
        check_backend(self._channel, backend)
        if not self._pool.check_layout(layout):
            return None
        from_disk = 0
        if self._pool.below(hashes):
            where = contexts, _depths(extents)
            from_disk = await asyncio.to_thread(self._pool.promote, hashes, token_ids, PROMOTE_TIMEOUT_S, *where)
        allocation = self._pool.get(hashes, token_ids, contexts)
        if not len(allocation.block_ids):
            self._pool.free(allocation)
            return None
        transfer_id = f"store:{secrets.token_hex(8)}"
        try:
            self._leases.pin(transfer_id, FIRST_EPOCH, allocation, allocation.num_cached_tokens)
        except BaseException:
            self._pool.free(allocation)
            raise
        self._extents.learn(hashes[: len(allocation.block_ids)], extents)
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
            disk_blocks=min(from_disk, len(allocation.block_ids)),
        )

    async def put(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        layout: KvLayout,
        source: KvSource,
        source_layout: KvLayout,
        timeout_s: float,
        extents: Sequence[Extent] = (),
        tenant: str = "",
        contexts: Sequence[bytes] = (),
    ) -> PutResult:
        """Pulls what is absent from `source`, whose lease the caller holds. Stores fewer when memory is short.

        The work on hashes and tokens, some microseconds a block, is done an extent at a time (PIECE_BLOCKS where the
        caller names none): calls of others get their turn in between. They find none of it before all of it is there.
        It counts in the share of `tenant`.

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
        size, puts = layout.block_size_tokens, list[PendingPut]()
        self._running_puts += 1
        try:
            starts, depths = _starts(extents, len(hashes)), _depths(extents)
            for at, end in itertools.pairwise(starts):
                known = contexts[at:end], depths[at:end]
                puts.append(self._pool.begin_put(hashes[at:end], token_ids[at * size : end * size], tenant, *known))
                await asyncio.sleep(0)
            table, wanted = _joined(puts, starts)
            num_bytes = await self._pull(table, wanted, source, source_layout, timeout_s)
            failpoints.hit("store.putting")
            # The beginning last: what was used last is evicted last, and the rest is of no use without it.
            for put in reversed(puts):
                self._pool.commit_put(put)
                await asyncio.sleep(0)
            self._extents.learn(hashes, extents)
        finally:
            # Whatever kept it from being committed: no one may find half-filled blocks.
            for put in puts:
                self._pool.abort_put(put)
            self._running_puts -= 1
        return PutResult(len(wanted), sum(put.num_present for put in puts), num_bytes)

    async def _pull(
        self, table: BlockIds, wanted: BlockIds, source: KvSource, source_layout: KvLayout, timeout_s: float
    ) -> int:
        """Fills block table[n] for each n in `wanted`, run by run; returns the bytes that crossed."""
        deadline_s, num_bytes, size = time.monotonic() + timeout_s, 0, self._pool.layout.block_size_tokens
        tokens = TokenPuller(self._channel, self._pool.regions(), self._pool.layout, buffers=self._buffers)
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
            if len(run):
                begin, end = int(run[0]) * size, (int(run[-1]) + 1) * size
                left_s = deadline_s - time.monotonic()
                pulled = await tokens.pull(source, source_layout, table, begin, end, timeout_s=left_s)
                num_bytes += pulled.bytes
        return num_bytes

    def recomputes_at(self, cost: RecomputeCost) -> None:
        """What computing takes a worker that asks for blocks."""
        if self._pool.settled:
            self._pool.recomputes_at(cost)

    def pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keeps blocks from eviction; returns how many: the first, where pins have used up their share."""
        most = int(self._pin_share * self._pool.regions().num_blocks)
        return self._pool.pin(hashes, ttl_s, most)


def _depths(extents: Sequence[Extent]) -> list[int]:
    """The blocks' numbers in their sequences; empty: not known."""
    return [depth for extent in extents for depth in range(extent.first, extent.stop)]


def _starts(extents: Sequence[Extent], num_blocks: int) -> list[int]:
    """Where the pieces of a put begin, and its end."""
    if extents:
        return [0, *itertools.accumulate(extent.num_blocks for extent in extents)]
    return [*range(0, num_blocks, PIECE_BLOCKS), num_blocks]


def _joined(puts: Sequence[PendingPut], starts: Sequence[int]) -> tuple[BlockIds, BlockIds]:
    """Of the pieces of one put: block table, and the positions in it that are to be filled."""
    positions = [put.positions + at for put, at in zip(puts, starts, strict=False)]
    wanted = np.concatenate([np.zeros(0, np.int32), *positions])
    table = np.zeros(1 + wanted.max(initial=-1), np.int32)
    table[wanted] = np.concatenate([np.zeros(0, np.int32), *(put.allocation.block_ids for put in puts)])
    return table, wanted
