"""Pulls of tokens: whatever blocks the source keeps them in, they end in ours.

same layout      the source's blocks ──► the pool
bridged layouts  the source's blocks ──► staging, in the source's layout ──► transcode ──► the pool, group by group
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from sagellm_common.comm_backend.daemon import finished
from sagellm_common.comm_backend.protocol import KVTransferChannel, TransferResult
from sagellm_common.comm_backend.transcode import Transcoder
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds, KvLayout, KvSource

STAGING_BYTES = 8 << 20
"""So much of a pull (but at least one block of ours) waits to be transcoded."""


class TokenPuller:
    """Pulls into `pool`, whose blocks have `layout`."""

    def __init__(self, channel: KVTransferChannel, pool: KvMemory, layout: KvLayout) -> None:
        self._channel = channel
        self._pool = pool
        self._layout = layout

    async def pull(
        self,
        source: KvSource,
        source_layout: KvLayout,
        target_blocks: BlockIds,
        begin_token: int,
        end_token: int,
        *,
        timeout_s: float,
    ) -> TransferResult:
        """Fills target_blocks, a sequence's block table from its token 0 on, with tokens [begin, end).

        So is source.block_table. `begin_token` is the first of a block of ours. The result counts our blocks and the
        bytes that crossed. Raises LayoutMismatch where there is no bridge, and what `KVTransferChannel.pull` raises.
        When it returns or raises, nobody writes to the blocks any more.
        """
        theirs, size = source_layout.block_size_tokens, self._layout.block_size_tokens
        if len(source.block_table) * theirs < end_token:
            raise InvalidRequest(
                f"source.block_table has {len(source.block_table)} blocks of {theirs} tokens, too few for {end_token}"
            )
        begin, end = begin_token // size, -(-end_token // size)
        if source_layout == self._layout:
            return await self._channel.pull(
                source, source.block_table[begin:end], target_blocks[begin:end], timeout_s=timeout_s
            )
        began_s, num_bytes = time.monotonic(), 0
        transcoder = Transcoder(source_layout, self._layout)
        # Whole blocks of ours at a time: a block of memory that the host only stages is written once.
        step = max(1, STAGING_BYTES // self._layout.block_bytes)
        staging = _staging(min(step, end - begin) * size // theirs + 2, source_layout)
        for at in range(begin, end, step):
            blocks = target_blocks[at : min(at + step, end)]
            run = range(at * size, min((at + len(blocks)) * size, end_token))
            first, stop = run.start // theirs, -(-run.stop // theirs)
            pulled = await self._channel.pull(
                source,
                source.block_table[first:stop],
                np.arange(stop - first, dtype=np.int32),
                timeout_s=timeout_s - (time.monotonic() - began_s),
                into=staging,
            )
            num_bytes += pulled.bytes
            await _in_thread(_move, transcoder, staging, first, self._pool, blocks, at, run)
        return TransferResult(num_bytes, time.monotonic() - began_s, end - begin)


def _move(
    transcoder: Transcoder,
    staging: KvRegion,
    first_staged: int,
    pool: KvMemory,
    blocks: BlockIds,
    first_block: int,
    tokens: range,
) -> None:
    """`tokens` of a sequence whose blocks from number `first_staged` on are staged into its `blocks` of the pool."""
    with pool.writing(blocks) as (region, ids):
        source_blocks = np.arange(first_staged + staging.num_blocks, dtype=np.int32) - first_staged
        target_blocks = np.concatenate([np.zeros(first_block, np.int32), ids])
        transcoder.move(staging, source_blocks, region, target_blocks, tokens.start, tokens.stop)


def _staging(num_blocks: int, layout: KvLayout) -> KvRegion:
    return KvRegion(np.empty(num_blocks * layout.block_bytes, np.uint8).data, layout.block_bytes, num_blocks)


async def _in_thread(work: Callable[..., None], *args: object) -> None:
    """Off the event loop. Cancelled, it first waits until `work` has ended."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await finished(working)
        raise
