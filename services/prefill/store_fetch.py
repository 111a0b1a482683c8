"""Prefix blocks from the kv_store, into blocks already allocated. A failure costs the hits, never the request."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

import numpy as np
from prometheus_client import Counter

from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.token_pull import TokenPuller
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvLayout, KvSource
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
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
    """Into blocks of `pool`, whatever the size of the store's."""

    def __init__(
        self, store: StoreClient, channel: PathsChannel, releaser: LeaseReleaser, pool: KVBackendProtocol
    ) -> None:
        self._store = store
        self._tokens = TokenPuller(channel, pool.regions(), pool.layout)
        self._releaser = releaser
        self._layout = pool.layout

    async def fetch(self, job: PrefillJob, allocation: Allocation) -> int:
        """Fills blocks after the cached ones with what the store holds and raises `num_cached_tokens`.

        Returns the number of tokens gained. At least one token stays to be computed. Raises no SageError.
        """
        size = self._layout.block_size_tokens
        begin = max(allocation.num_cached_tokens // size, allocation.num_shared_blocks)
        end = (len(job.prompt) - 1) // size
        if begin >= end or not self._store.available:
            return 0
        found = None
        timeout_s = FETCH_TIMEOUT_S + (end - begin) * self._layout.block_bytes / SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout(min(timeout_s, job.timeout_s / 2)):
                found = await self._find(job, begin * size, end * size)
                if found is not None:
                    await self._pull(found, allocation, begin * size, timeout_s, job.priority)
        except (SageError, TimeoutError) as err:
            if found is not None:
                self._store.failed(found.source.worker_id)
            FETCHES.labels("failed").inc()
            log.warning("request %s goes without the kv_store: %r", job.request_id, err)
            return 0
        if found is None or found.end_token <= begin * size:
            FETCHES.labels("miss").inc()
            return 0
        FETCHES.labels("hit").inc()
        before, allocation.num_cached_tokens = allocation.num_cached_tokens, found.end_token
        return allocation.num_cached_tokens - before

    async def _find(self, job: PrefillJob, begin_token: int, end_token: int) -> _Found | None:
        """The store's blocks that hold tokens from `begin_token` up to `end_token` at most; None for none."""
        layout = await self._store.layout()
        if layout is None:
            return None
        size = layout.block_size_tokens
        first, stop = begin_token // size, min(-(-end_token // size), len(job.prompt) // size)
        if first >= stop:
            return None
        hashes = block_hashes(job.prompt[: stop * size], size, root_hash(layout, job.cache_salt))
        source = await self._store.get(hashes[first:], job.prompt[first * size : stop * size], layout)
        if source is None:
            return None
        table = np.concatenate([np.zeros(first, np.int32), source.block_table[: stop - first]])
        full = min(len(table) * size, end_token) // self._layout.block_size_tokens
        return _Found(replace(source, block_table=table), layout, full * self._layout.block_size_tokens)

    async def _pull(
        self, found: _Found, allocation: Allocation, begin_token: int, timeout_s: float, priority: int
    ) -> None:
        committed = False
        try:
            if begin_token < found.end_token:
                await self._tokens.pull(
                    found.source,
                    found.layout,
                    allocation.block_ids,
                    begin_token,
                    found.end_token,
                    timeout_s=timeout_s,
                    priority=priority,
                )
            committed = True
        finally:
            self._releaser.release(found.source, committed)


@dataclass(frozen=True, slots=True)
class _Found:
    """Pinned blocks of the store, their table as if it began at the prompt's first token; they hold the prompt's full
    blocks of our size up to `end_token`."""

    source: KvSource
    layout: KvLayout
    end_token: int
