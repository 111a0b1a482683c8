"""Finished blocks to the kv_stores, each extent to its owners, so that they outlive this worker. Never on the path of a
token."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import Counter

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.errors import Draining, SageError
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, TokenIds, pack_int32
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.matcher import contexts
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent, extents
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.store_client import PutResult, StoreClient
from sagellm_common.rpc.worker_service import WorkerView

log = logging.getLogger(__name__)

MAX_CONCURRENT = 2
MAX_POOL_SHARE = 0.25
"""Of the worker's blocks that may wait for the store; what comes beyond is dropped, for blocks are for sequences.

One sequence may always: a prompt as long as the pool would never be stored otherwise.
"""
PUT_TIMEOUT_S = 5.0
"""For a first byte. The bytes of a long sequence take their time: see SLOWEST_BYTES_PER_S."""
SLOWEST_BYTES_PER_S = 200e6
"""A store that takes less than this is not waited for."""
EXTENTS_PER_PUT = 16
"""A store works on a call of so many at a time."""

OFFLOADS = Counter("sagellm_decode_offloads", "Finished sequences offered to kv_store.", ["outcome"])
OFFLOADED_BLOCKS = Counter("sagellm_decode_offloaded_blocks", "Blocks kv_store took, or had already.", ["outcome"])


class Offloader:
    """MAX_CONCURRENT at a time; the others wait with their blocks pinned, within MAX_POOL_SHARE and their lease."""

    def __init__(
        self,
        store: StoreClient,
        leases: HandoffSource,
        worker: WorkerView,
        layout: KvLayout,
        background: Background,
        pool_blocks: int,
    ) -> None:
        self._store = store
        self._leases = leases
        self._worker = worker
        self._layout = layout
        self._background = background
        self._max_pinned_blocks = int(pool_blocks * MAX_POOL_SHARE)
        self._pinned_blocks = 0
        self._turn = asyncio.Semaphore(MAX_CONCURRENT)
        self._numbers = itertools.count()

    def offer(
        self,
        request_id: str,
        attempt: int,
        token_ids: TokenIds,
        cache_salt: str,
        blocks: OwnedBlocks,
        tenant: str = "",
    ) -> None:
        """Takes the blocks over if it offloads them, else leaves them with the caller."""
        num_blocks = blocks.allocation.num_cached_tokens // self._layout.block_size_tokens
        if num_blocks == 0 or not self._store.available:
            return
        if self._pinned_blocks and self._pinned_blocks + num_blocks > self._max_pinned_blocks:
            OFFLOADS.labels("dropped").inc()
            return
        # Numbered, for a request id may come again before this lease has ended, with other tokens.
        transfer_id, epoch = f"offload:{request_id}#{next(self._numbers)}", self._leases.new_epoch(attempt)
        num_tokens = num_blocks * self._layout.block_size_tokens
        try:
            pinned = self._leases.pin(transfer_id, epoch, blocks.allocation, num_tokens)
        except Draining:
            return
        # From here on the lease table owns them, so that nothing leaks should the task never get to run.
        blocks.hand_over()
        self._pinned_blocks += num_blocks
        self._background.spawn(
            self._offload(
                transfer_id, epoch, pinned.block_ids[:num_blocks], token_ids[:num_tokens], cache_salt, tenant
            ),
            f"offload of request {request_id}",
            on_end=lambda: self._ended(transfer_id, epoch, num_blocks),
        )

    def _ended(self, transfer_id: str, epoch: int, num_blocks: int) -> None:
        self._pinned_blocks -= num_blocks
        self._leases.release(transfer_id, epoch, committed=True)

    async def _offload(
        self,
        transfer_id: str,
        epoch: int,
        block_ids: BlockIds,
        token_ids: TokenIds,
        cache_salt: str,
        tenant: str,
    ) -> None:
        timeout_s = PUT_TIMEOUT_S + len(block_ids) * self._layout.block_bytes / SLOWEST_BYTES_PER_S
        try:
            async with self._turn, asyncio.timeout(timeout_s):
                layout = await self._store.layout() or self._store.first_layout()
                root = root_hash(layout, cache_salt)
                hashes = block_hashes(token_ids, layout.block_size_tokens, root)
                wanted = extents(hashes)
                lacking: dict[str, list[Extent]] = {}
                for extent, present in zip(wanted, await self._store.owned(hashes, wanted, layout), strict=True):
                    for store_id, count in present.items():
                        OFFLOADED_BLOCKS.labels("present").inc(count)
                        if count < extent.num_blocks:
                            rest = Extent(extent.key, extent.first + count, extent.stop)
                            lacking.setdefault(store_id, []).append(rest)
                known = list(contexts(root, pack_int32(token_ids), 4 * layout.block_size_tokens)) if lacking else []
                offered = _Offered(transfer_id, epoch, block_ids, token_ids, layout, hashes, known, tenant)
                failed = await asyncio.gather(
                    *(self._put(offered, store_id, rest, timeout_s) for store_id, rest in lacking.items())
                )
        except (SageError, TimeoutError) as err:
            OFFLOADS.labels("failed").inc()
            log.warning("%s failed: %r", transfer_id, err)
        else:
            OFFLOADS.labels("failed" if any(failed) else "done").inc()

    async def _put(self, offered: _Offered, store_id: str, lacking: Sequence[Extent], timeout_s: float) -> bool:
        """Offers one store what it lacks; True when it did not take it, which is no matter of the others'."""
        try:
            for batch in self._batches(lacking, offered.layout):
                result = await self._put_batch(offered, store_id, batch, timeout_s)
                OFFLOADED_BLOCKS.labels("stored").inc(result.num_stored)
                if result.num_stored + result.num_present == 0:
                    break  # it is full of what it may not evict
        except SageError as err:
            log.warning("%s to kv_store %s failed: %r", offered.transfer_id, store_id, err)
            return True
        return False

    def _batches(self, lacking: Sequence[Extent], layout: KvLayout) -> Iterator[list[Extent]]:
        """In calls of a bounded number of blocks. Extents that end within our blocks go one by one: what is offered
        together begins and ends with a block of ours."""
        together = EXTENTS_PER_PUT
        if EXTENT_BLOCKS * layout.block_size_tokens % self._layout.block_size_tokens:
            together = 1
        for at in range(0, len(lacking), together):
            yield list(lacking[at : at + together])

    async def _put_batch(
        self, offered: _Offered, store_id: str, batch: Sequence[Extent], timeout_s: float
    ) -> PutResult:
        """As blocks of one sequence, gaps left out."""
        theirs, ours = offered.layout.block_size_tokens, self._layout.block_size_tokens
        step = math.lcm(theirs, ours)
        hashes: list[BlockHash] = []
        known: list[bytes] = []
        tokens: list[TokenIds] = []
        block_ids: list[BlockIds] = []
        described: list[Extent] = []
        num_tokens = 0
        for extent in batch:
            # From where a block begins on both sides; what the store has of it already it does not pull.
            origin, stop = extent.first * theirs // step * step, extent.stop * theirs
            hashes += offered.hashes[origin // theirs : extent.stop]
            known += offered.contexts[origin // theirs : extent.stop]
            tokens.append(offered.token_ids[origin:stop])
            block_ids.append(offered.block_ids[origin // ours : -(-stop // ours)])
            described.append(Extent(extent.key, origin // theirs, extent.stop))
            num_tokens += stop - origin
        source = describe_source(
            self._worker.record,
            self._layout,
            transfer_id=offered.transfer_id,
            epoch=offered.epoch,
            block_ids=np.concatenate(block_ids),
            num_tokens=num_tokens,
            lease_ttl_s=self._leases.ttl_s,
        )
        whole = all(extent.num_blocks <= EXTENT_BLOCKS - extent.offset for extent in described)
        return await self._store.put(
            store_id,
            hashes,
            np.concatenate(tokens),
            source,
            offered.layout,
            timeout_s=timeout_s,
            extents=described if whole else (),
            contexts=known,
            tenant=offered.tenant,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Offered:
    """Pinned blocks of one sequence, from its first token on; `hashes` and `contexts` in the stores'
    `layout`."""

    transfer_id: str
    epoch: int
    block_ids: BlockIds
    token_ids: TokenIds
    layout: KvLayout
    hashes: list[BlockHash]
    contexts: list[bytes]
    tenant: str
