"""A prompt's KV out of another worker's cache, into blocks already allocated. A failure costs the hits, never the
request.

plan: who holds how much ──► LendCached ──► pull over the byte path that handoffs take ──► ReleaseLease
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from prometheus_client import Counter

from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.token_pull import TokenPuller
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvLayout, KvPeer, KvSource, TokenIds
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.worker_service import WorkerView

log = logging.getLogger(__name__)

LEND_TIMEOUT_S = 0.5
SLOWEST_BYTES_PER_S = 200e6
"""A worker that sends less than this is not waited for."""
RETRY_AFTER_S = 1.0
"""A worker that failed is left alone for so long."""

FETCHES = Counter("sagellm_prefill_peer_fetches", "Attempts to fetch KV from another worker's cache.", ["outcome"])


class PeerFetch:
    def __init__(
        self,
        transfers: KvTransferClient,
        channel: PathsChannel,
        releaser: LeaseReleaser,
        pool: KVBackendProtocol,
        worker: WorkerView,
    ) -> None:
        self._transfers = transfers
        self._channel = channel
        self._releaser = releaser
        self._worker = worker
        self._layout = pool.layout
        self._tokens = TokenPuller(channel, pool.regions(), pool.layout)
        self._skip_until_s: dict[str, float] = {}

    def end_token(self, token_ids: TokenIds, peer: KvPeer) -> int:
        """Up to where `peer` may help: whole blocks of ours, and at least one token stays to be computed."""
        size = self._layout.block_size_tokens
        return min(peer.cached_tokens, len(token_ids) - 1) // size * size

    async def fetch(
        self,
        request_id: str,
        token_ids: TokenIds,
        allocation: Allocation,
        peer: KvPeer,
        *,
        timeout_s: float,
        cache_salt: str = "",
        priority: int = 0,
    ) -> int:
        """Fills blocks after the cached ones, raises `num_cached_tokens` and notes `origins`.

        Returns the number of tokens gained. Takes half of timeout_s at most. Raises no SageError.
        """
        size, now_s = self._layout.block_size_tokens, asyncio.get_running_loop().time
        begin = max(allocation.num_cached_tokens // size, allocation.num_shared_blocks) * size
        end = self.end_token(token_ids, peer)
        if begin >= end or self._skip_until_s.get(peer.worker_id, 0.0) > now_s():
            return 0
        num_bytes = (end - begin) // size * self._layout.block_bytes
        limit_s = min(timeout_s / 2, 2 * LEND_TIMEOUT_S + num_bytes / SLOWEST_BYTES_PER_S)
        try:
            async with asyncio.timeout(limit_s):
                lent = await self._transfers.lend_cached(
                    peer,
                    token_ids[:end],
                    cache_salt,
                    worker_id=self._worker.record.worker_id,
                    layout=self._layout,
                    backend=self._channel.name,
                    timeout_s=min(limit_s, LEND_TIMEOUT_S),
                )
                reached = await self._pull(*lent, allocation, begin, end, limit_s, priority) if lent else begin
        except (SageError, TimeoutError) as err:
            FETCHES.labels("failed").inc()
            self._skip_until_s[peer.worker_id] = now_s() + RETRY_AFTER_S
            log.warning("request %s: worker %s gave nothing of its cache: %r", request_id, peer.worker_id, err)
            return 0
        before = allocation.num_cached_tokens
        gained = max(0, reached - before)
        FETCHES.labels("hit" if gained else "miss").inc()
        allocation.num_cached_tokens += gained
        allocation.origins = replace(allocation.origins, peer_tokens=gained)
        return gained

    async def _pull(
        self,
        source: KvSource,
        theirs: KvLayout,
        allocation: Allocation,
        begin: int,
        end: int,
        timeout_s: float,
        priority: int,
    ) -> int:
        """The first token that is not here afterwards."""
        committed = False
        try:
            stop = min(end, source.num_tokens) // self._layout.block_size_tokens * self._layout.block_size_tokens
            if begin < stop:
                blocks = allocation.block_ids
                await self._tokens.pull(source, theirs, blocks, begin, stop, timeout_s=timeout_s, priority=priority)
            committed = True
            return stop
        finally:
            self._releaser.release(source, committed)
