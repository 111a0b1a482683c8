"""Keeps each extent at its owners when stores come and go: whoever holds one gives it to the owners that lack it.

    a store joined, died, drains ──► for each extent here: its owners now ──► Lookup there ──► Put of what is lacking
                                                                              (which the owner pulls from here)

Nobody coordinates it: every holder looks, and what two offer at once the owner takes once. What nobody owns any more is
left to eviction. Only what is in memory is given on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

from prometheus_client import Counter

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.errors import SageError
from sagellm_common.core.topology import TopologySnapshot, TopologyStore
from sagellm_common.core.types import BlockHash, KvLayout, WorkerRole, WorkerState
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.worker_service import WorkerView
from services.kv_store.extents import ExtentTable

log = logging.getLogger(__name__)

EXTENTS_PER_LOOKUP = 64
PUT_TIMEOUT_S = 10.0
RETRY_S = 2.0
SWEEP_S = 300.0
"""Between looks when nothing seems to have changed: an owner that did not answer at a put was passed over there."""
EPOCH = 1

GIVEN = Counter("sagellm_kv_store_replicated_blocks", "Blocks given to other stores that had come to own them.")
FAILED = Counter("sagellm_kv_store_replications_failed", "Extents that an owner did not take.")


class Replicator:
    """`run` until cancelled. At most `bytes_per_s` on average, so that requests get their share of links and memory.

    `stores` makes a client for one whose blocks have that layout. A draining store is nobody's owner: it gives on
    all it has, `busy` until it has tried.
    """

    def __init__(
        self,
        pool: HostKvPool,
        extents: ExtentTable,
        leases: HandoffSource,
        worker: WorkerView,
        topology: TopologyStore,
        stores: Callable[[KvLayout], StoreClient],
        bytes_per_s: float,
    ) -> None:
        self._pool = pool
        self._extents = extents
        self._leases = leases
        self._worker = worker
        self._topology = topology
        self._client = stores
        self._bytes_per_s = bytes_per_s
        self._wanted = asyncio.Event()
        self._drained = False
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether this store drains and has not yet given on what it holds."""
        if self._worker.record.state is not WorkerState.DRAINING or self._drained:
            return False
        self._wanted.set()  # the topology's news of it would take their time
        return True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as running:
            running.create_task(self._follow())
            running.create_task(self._replicate())

    async def _follow(self) -> None:
        """Wakes `_replicate` when stores come, go, drain, or have lost what they had."""
        seen = _stores(self._topology.snapshot())
        async with aclosing(cast("Any", self._topology.changes())) as changes:
            async for snapshot in changes:
                if (now := _stores(snapshot)) != seen:
                    seen = now
                    self._wanted.set()

    async def _replicate(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), SWEEP_S)
            self._wanted.clear()
            draining = self._worker.record.state is WorkerState.DRAINING
            try:
                whole = await self.give_on()
            except SageError as err:
                log.info("nothing is given to other stores: %s", err.message)
                whole = False
            self._drained = self._drained or draining
            if not whole and not draining:
                asyncio.get_running_loop().call_later(RETRY_S, self._wanted.set)

    async def give_on(self) -> bool:
        """One look at everything here; False when an owner has not taken what it lacks, or did not say what it has.

        Raises the SageError of the only other store.
        """
        if not self._pool.regions().num_blocks:
            return True
        layout, whole, num_blocks = self._pool.layout, True, 0
        stores, stored = self._client(layout), list(self._extents.stored().items())
        for at in range(0, len(stored), EXTENTS_PER_LOOKUP):
            batch = stored[at : at + EXTENTS_PER_LOOKUP]
            # As one sequence, of extents that need not be full.
            hashes = [h for _, blocks in batch for h in [*blocks, *[b""] * (EXTENT_BLOCKS - len(blocks))]]
            wanted = [
                Extent(key, n * EXTENT_BLOCKS, n * EXTENT_BLOCKS + len(blocks)) for n, (key, blocks) in enumerate(batch)
            ]
            present = await stores.owned(hashes, wanted, layout, without=self._worker.record.worker_id)
            whole = whole and not stores.left_alone
            for extent, (_, blocks), owners in zip(wanted, batch, present, strict=True):
                for store_id, count in owners.items():
                    if count < len(blocks):
                        given = await self._give(stores, store_id, extent.key, blocks, count)
                        whole, num_blocks = whole and given is not None, num_blocks + (given or 0)
        if num_blocks:
            log.info("gave %d blocks to stores that own them now", num_blocks)
        return whole

    async def _give(
        self, stores: StoreClient, store_id: str, key: BlockHash, blocks: Sequence[BlockHash], have: int
    ) -> int | None:
        """Offers blocks[have:]; returns how many were taken, None when it failed."""
        layout, (keys, allocation) = self._pool.layout, self._pool.hold(blocks[have:])
        with OwnedBlocks(self._pool, allocation) as owned:
            whole = list(
                itertools.takewhile(lambda pair: pair[0].hash == pair[1], zip(keys, blocks[have:], strict=False))
            )
            if not whole:
                return 0  # evicted meanwhile
            num_tokens = len(whole) * layout.block_size_tokens
            depth = whole[0][0].depth
            first = depth if depth % EXTENT_BLOCKS == have else have  # within the extent, where more is not known
            transfer_id = f"replica:{secrets.token_hex(4)}#{next(self._numbers)}"
            try:
                pinned = self._leases.pin(transfer_id, EPOCH, owned.allocation, num_tokens)
                owned.hand_over()
                source = describe_source(
                    self._worker.record,
                    layout,
                    transfer_id=transfer_id,
                    epoch=EPOCH,
                    block_ids=pinned.block_ids,
                    num_tokens=num_tokens,
                    lease_ttl_s=self._leases.ttl_s,
                )
                began_s = asyncio.get_running_loop().time()
                result = await stores.put(
                    store_id,
                    [found.hash for found, _ in whole],
                    b"".join(found.token_bytes for found, _ in whole),
                    source,
                    layout,
                    timeout_s=PUT_TIMEOUT_S,
                    extents=[Extent(key, first, first + len(whole))],
                    contexts=[found.context for found, _ in whole],
                )
            except SageError as err:
                FAILED.inc()
                log.info("store %s does not take an extent: %s", store_id, err.message)
                return None
            finally:
                self._leases.release(transfer_id, EPOCH, committed=True, by="decode")
        GIVEN.inc(result.num_stored)
        spent_s = asyncio.get_running_loop().time() - began_s
        await asyncio.sleep(max(0.0, result.bytes_pulled / self._bytes_per_s - spent_s))
        return result.num_stored


def _stores(snapshot: TopologySnapshot) -> set[tuple[str, str, WorkerState]]:
    return {
        (record.worker_id, record.incarnation, record.state)
        for record in snapshot.workers
        if record.role is WorkerRole.KV_STORE
    }
