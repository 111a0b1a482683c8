"""Finished blocks to the kv_store, so that they outlive this worker. Never on the path of a token."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math

from prometheus_client import Counter

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.errors import Draining, SageError
from sagellm_common.core.types import BlockIds, KvLayout, TokenIds
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.store_client import StoreClient
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

    def offer(self, request_id: str, attempt: int, token_ids: TokenIds, cache_salt: str, blocks: OwnedBlocks) -> None:
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
            self._offload(transfer_id, epoch, pinned.block_ids[:num_blocks], token_ids[:num_tokens], cache_salt),
            f"offload of request {request_id}",
            on_end=lambda: self._ended(transfer_id, epoch, num_blocks),
        )

    def _ended(self, transfer_id: str, epoch: int, num_blocks: int) -> None:
        self._pinned_blocks -= num_blocks
        self._leases.release(transfer_id, epoch, committed=True)

    async def _offload(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, token_ids: TokenIds, cache_salt: str
    ) -> None:
        timeout_s = PUT_TIMEOUT_S + len(block_ids) * self._layout.block_bytes / SLOWEST_BYTES_PER_S
        try:
            async with self._turn, asyncio.timeout(timeout_s):
                layout = await self._store.layout() or self._layout
                size, mine = layout.block_size_tokens, self._layout.block_size_tokens
                hashes = block_hashes(token_ids, size, root_hash(layout, cache_salt))
                present = await self._store.lookup(hashes, layout)
                OFFLOADED_BLOCKS.labels("present").inc(present)
                if present < len(hashes):
                    # What the store lacks, from where a block begins on both sides.
                    first = present * size // math.lcm(size, mine) * math.lcm(size, mine)
                    source = describe_source(
                        self._worker.record,
                        self._layout,
                        transfer_id=transfer_id,
                        epoch=epoch,
                        block_ids=block_ids[first // mine :],
                        num_tokens=len(token_ids) - first,
                        lease_ttl_s=self._leases.ttl_s,
                    )
                    result = await self._store.put(
                        hashes[first // size :],
                        token_ids[first : len(hashes) * size],
                        source,
                        layout,
                        timeout_s=timeout_s,
                    )
                    OFFLOADED_BLOCKS.labels("stored").inc(result.num_stored)
        except (SageError, TimeoutError) as err:
            OFFLOADS.labels("failed").inc()
            log.warning("%s failed: %r", transfer_id, err)
        else:
            OFFLOADS.labels("done").inc()
