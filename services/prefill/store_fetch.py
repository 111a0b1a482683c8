"""Prefix blocks from the kv_store, into blocks already allocated. A failure costs the hits, never the request."""

from __future__ import annotations

import asyncio
import logging

from prometheus_client import Counter

from sagellm_common.comm_backend.protocol import KVTransferChannel
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvLayout, KvSource
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.store_client import StoreClient
from services.prefill.jobs import PrefillJob

log = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 2.0
"""For a first byte. The bytes of a long prompt take their time: see SLOWEST_BYTES_PER_S."""
SLOWEST_BYTES_PER_S = 200e6
"""A store that sends less than this is not waited for."""

FETCHES = Counter("sagellm_prefill_store_fetches", "Attempts to fetch prefix blocks from kv_store.", ["outcome"])


class StoreFetch:
    def __init__(
        self, store: StoreClient, channel: KVTransferChannel, releaser: LeaseReleaser, layout: KvLayout
    ) -> None:
        self._store = store
        self._channel = channel
        self._releaser = releaser
        self._layout = layout

    async def fetch(self, job: PrefillJob, allocation: Allocation) -> int:
        """Fills blocks after the cached ones with what the store holds and raises `num_cached_tokens`.

        Returns the number of tokens gained. At least one token stays to be computed. Raises no SageError.
        """
        size = self._layout.block_size_tokens
        begin = max(allocation.num_cached_tokens // size, allocation.num_shared_blocks)
        end = (len(job.prompt) - 1) // size
        if begin >= end or not self._store.available:
            return 0
        source = None
        hashes = block_hashes(job.prompt[: end * size], size, root_hash(self._layout, job.cache_salt))
        timeout_s = FETCH_TIMEOUT_S + (end - begin) * self._layout.block_bytes / SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout(min(timeout_s, job.timeout_s / 2)):
                source = await self._store.get(hashes[begin:end], job.prompt[begin * size : end * size])
                if source is None:
                    FETCHES.labels("miss").inc()
                    return 0
                num_blocks = min(len(source.block_table), end - begin)
                await self._pull(source, num_blocks, allocation, begin, timeout_s)
        except (SageError, TimeoutError) as err:
            if source is not None:
                self._store.failed(source.worker_id)
            FETCHES.labels("failed").inc()
            log.warning("request %s goes without the kv_store: %r", job.request_id, err)
            return 0
        FETCHES.labels("hit").inc()
        before, allocation.num_cached_tokens = allocation.num_cached_tokens, (begin + num_blocks) * size
        return allocation.num_cached_tokens - before

    async def _pull(
        self, source: KvSource, num_blocks: int, allocation: Allocation, begin: int, timeout_s: float
    ) -> None:
        committed = False
        try:
            await self._channel.pull(
                source,
                source.block_table[:num_blocks],
                allocation.block_ids[begin : begin + num_blocks],
                timeout_s=timeout_s,
            )
            committed = True
        finally:
            self._releaser.release(source, committed)
