"""Pulls of tokens: whatever blocks the source keeps them in, and in whatever dtype, they end in ours.

one layout       the source's blocks ──► the pool
bridged layouts  the source's blocks ──► `bridge.Incoming`, in the source's cut ──► the pool, group by group
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np

from sagellm_common.comm_backend.bridge import Buffers, Incoming
from sagellm_common.comm_backend.daemon import finished
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.protocol import Encoding, Pull, PullAlong, TransferResult
from sagellm_common.comm_backend.transcode import Transcoder
from sagellm_common.comm_backend.wire_dtype import wire_layout
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvLayout, KvSource

LinkSpeed = Callable[[KvSource], float]
"""Bytes per second from a source; 0: not known."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How tokens come: from blocks of `source`, over the link as blocks of `wire`, into blocks of `target`."""

    tokens: range
    source: KvLayout
    wire: KvLayout
    target: KvLayout

    @property
    def theirs(self) -> slice:
        return _blocks(self.tokens, self.wire)

    @property
    def ours(self) -> slice:
        return _blocks(self.tokens, self.target)

    @property
    def direct(self) -> bool:
        return self.wire == self.target

    @property
    def encoding(self) -> Encoding | None:
        """None: the source sends its blocks as they are."""
        if self.wire == self.source:
            return None
        size = self.wire.block_size_tokens
        last = self.tokens.stop - (self.tokens.stop - 1) // size * size
        return Encoding(self.wire.dtype, self.wire.block_bytes, last)


class TokenPuller:
    """Pulls into `pool`, whose blocks have `layout`. `settings` are asked for at each pull; without, nothing is lost on
    the way but what the two dtypes make inevitable."""

    def __init__(
        self,
        channel: PathsChannel,
        pool: KvMemory,
        layout: KvLayout,
        settings: Callable[[], TransportConfig] = TransportConfig,
        link_speed: LinkSpeed | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self._channel = channel
        self._pool = pool
        self._layout = layout
        self._settings = settings
        self._link_speed = link_speed or (lambda _: settings().link_bytes_per_s)
        self._buffers = buffers or Buffers()

    async def pull(
        self,
        source: KvSource,
        source_layout: KvLayout,
        target_blocks: BlockIds,
        begin_token: int,
        end_token: int,
        *,
        timeout_s: float,
        priority: int = 0,
        wire_dtype: str = "",
    ) -> TransferResult:
        """Fills target_blocks, a sequence's block table from its token 0 on, with tokens [begin, end).

        So is source.block_table. `wire_dtype` is a plan's; "": that of the settings. `begin_token` is the first of a
        block of ours. The result counts our blocks and the
        bytes that crossed. Raises LayoutMismatch where there is no bridge, and what `PathsChannel.pull` raises.
        When it returns or raises, nobody writes to the blocks any more.
        """
        way = await self._way(source, source_layout, range(begin_token, end_token), wire_dtype)
        table = source.block_table[way.theirs]
        if way.direct:
            ours = target_blocks[way.ours]
            asked = Pull(source, table, ours, timeout_s=timeout_s, encoding=way.encoding, priority=priority)
            pulled = await self._channel.pull(asked)
            return _reported(way, pulled)
        began_s = time.monotonic()
        async with self._incoming(way, target_blocks) as incoming:
            asked = Pull(
                source,
                table,
                np.arange(len(table), dtype=np.int32),
                timeout_s=timeout_s,
                into=incoming,
                encoding=way.encoding,
                priority=priority,
            )
            pulled = await self._channel.pull(asked)
        return _reported(way, replace(pulled, seconds=time.monotonic() - began_s), incoming)

    async def pull_along(
        self,
        source: KvSource,
        source_layout: KvLayout,
        target_blocks: BlockIds,
        begin_token: int,
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None],
        priority: int = 0,
        wire_dtype: str = "",
    ) -> TransferResult:
        """As `pull`, of all tokens from `begin_token` on, while they are computed: see `KVTransferChannel`."""
        way = await self._way(source, source_layout, range(begin_token, source.num_tokens), wire_dtype)
        first, table = way.theirs.start, source.block_table[way.theirs]
        if way.direct:
            ours = target_blocks[way.ours]
            asked = PullAlong(
                source,
                first,
                ours,
                timeout_s=timeout_s,
                on_bytes=on_bytes,
                encoding=way.encoding,
                priority=priority,
            )
            pulled = await self._channel.pull_along(asked)
            return _reported(way, pulled)
        async with self._incoming(way, target_blocks) as incoming:
            asked = PullAlong(
                source,
                first,
                np.arange(len(table), dtype=np.int32),
                timeout_s=timeout_s,
                on_bytes=on_bytes,
                into=incoming,
                encoding=way.encoding,
                priority=priority,
            )
            pulled = await self._channel.pull_along(asked)
        return _reported(way, pulled, incoming)

    async def _way(self, source: KvSource, theirs: KvLayout, tokens: range, wire_dtype: str) -> _Way:
        held = len(source.block_table) * theirs.block_size_tokens
        if held < tokens.stop:
            raise InvalidRequest(
                f"source.block_table has {len(source.block_table)} blocks of {theirs.block_size_tokens} tokens, too "
                f"few for {tokens.stop}"
            )
        wire, settings = theirs, self._settings()
        if wire_dtype:
            settings = settings.model_copy(update={"wire_dtype": wire_dtype})
        if self._channel.encodes and (theirs.dtype != self._layout.dtype or settings.wire_dtype != "same"):
            # On a thread, for what it costs to convert may have to be measured first.
            speed = self._link_speed(source)
            wire = await asyncio.to_thread(wire_layout, settings, theirs, self._layout, len(tokens), speed)
        return _Way(tokens, theirs, wire, self._layout)

    @asynccontextmanager
    async def _incoming(self, way: _Way, target_blocks: BlockIds) -> AsyncIterator[Incoming]:
        """Left in whatever way, everything that was written to it is transcoded, and nothing more will be."""
        transcoder = Transcoder(way.wire, way.target)
        incoming = Incoming(transcoder, self._pool, target_blocks, way.tokens, self._buffers)
        try:
            yield incoming
            await _in_thread(incoming.wait)
        except BaseException:
            with contextlib.suppress(Exception):  # the error that is on its way came first
                await _in_thread(incoming.wait)
            raise


def _blocks(tokens: range, layout: KvLayout) -> slice:
    size = layout.block_size_tokens
    return slice(tokens.start // size, -(-tokens.stop // size))


def _reported(way: _Way, pulled: TransferResult, incoming: Incoming | None = None) -> TransferResult:
    """In blocks of ours, and with what converting has cost on both sides."""
    converted = len({way.source.dtype, way.wire.dtype, way.target.dtype}) > 1
    deviation = pulled.deviation or Deviation()
    if incoming is not None:
        deviation = deviation.then(incoming.deviation)
    return replace(
        pulled,
        blocks=way.ours.stop - way.ours.start,
        wire_dtype=way.wire.dtype,
        deviation=deviation if converted else None,
        transcode_s=incoming.seconds if incoming is not None else 0.0,
    )


async def _in_thread(work: Callable[[], None]) -> None:
    """Off the event loop. Cancelled, it first waits until `work` has ended."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await finished(working)
        raise
