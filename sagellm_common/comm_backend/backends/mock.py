"""A byte path within one process, with faults on request: for tests of what stands on top of byte paths."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import xxhash

from sagellm_common.comm_backend.bridge import fill
from sagellm_common.comm_backend.integrity import DIGEST_BYTES, block_digests, check_pull, check_targets, verify_digests
from sagellm_common.comm_backend.pieces import in_order
from sagellm_common.comm_backend.protocol import LeasedBlocks, Pull, PullAlong, Regions, TransferResult, check_encoding
from sagellm_common.comm_backend.segments import SegmentCutter
from sagellm_common.core.errors import Draining, InvalidRequest, LayoutMismatch, PeerLost
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.kv_progress import Watermark
from sagellm_common.core.types import BlockIds, KvSource

WAIT_S = 0.05
"""How often a pull along looks whether it was cancelled."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with each pull; offsets are bytes of its payload."""

    drop_after_bytes: int | None = None
    """The source dies."""
    stall_after_bytes: int | None = None
    """The source stops, but lives."""
    corrupt_at_byte: int | None = None
    delay_s: float = 0.0

    @classmethod
    def seeded(cls, seed: int, num_bytes: int) -> Self:
        """One fault of a random kind somewhere in a payload of num_bytes."""
        rng = random.Random(seed)
        kind = rng.choice(["drop_after_bytes", "stall_after_bytes", "corrupt_at_byte"])
        return cls(**{kind: rng.randrange(num_bytes)})


class MockNetwork:
    """Who can reach whom: the channels that were started, by address."""

    def __init__(self) -> None:
        self.channels: dict[str, MockChannel] = {}


class MockChannel:
    """A `KVTransferChannel` between all channels of one `MockNetwork`."""

    name = "mock"
    pulls_along = True
    encodes = False

    def __init__(
        self,
        network: MockNetwork,
        regions: Regions,
        leases: LeasedBlocks,
        faults: Faults | None = None,
        *,
        digest: bool = True,
    ) -> None:
        self.address = ""
        self.faults = faults or Faults()
        self._network = network
        self._regions = regions
        self._leases = leases
        self._digest = digest
        self._closed = False

    async def start(self) -> str:
        self.address = f"mock:{id(self)}"
        self._network.channels[self.address] = self
        return self.address

    async def pull(self, asked: Pull) -> TransferResult:
        check_encoding(self, asked)
        memory, source, target_blocks = asked.into or self._regions(), asked.source, asked.target_blocks
        check_pull(memory, asked.source_blocks, target_blocks)
        if self._closed:
            raise Draining("this worker's KV byte path is closed")
        began_s = time.monotonic()
        if len(target_blocks):
            try:
                async with asyncio.timeout(asked.timeout_s):
                    await self._copy(memory, source, asked.source_blocks, target_blocks)
            except TimeoutError as err:
                raise PeerLost(
                    f"transfer {source.transfer_id!r}: the source was silent for {asked.timeout_s:g} s"
                ) from err
        num_bytes = len(target_blocks) * memory.block_bytes
        return TransferResult(num_bytes, time.monotonic() - began_s, len(target_blocks))

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        check_encoding(self, asked)
        memory, source, target_blocks = asked.into or self._regions(), asked.source, asked.target_blocks
        check_targets(memory, target_blocks)
        if self._closed:
            raise Draining("this worker's KV byte path is closed")
        began_s = time.monotonic()
        if len(target_blocks):
            try:
                async with asyncio.timeout(asked.timeout_s):
                    await self._copy_along(memory, source, asked.first_block, target_blocks, asked.on_bytes)
            except TimeoutError as err:
                raise PeerLost(
                    f"transfer {source.transfer_id!r}: the source was silent for {asked.timeout_s:g} s"
                ) from err
        num_bytes = len(target_blocks) * memory.block_bytes
        return TransferResult(num_bytes, time.monotonic() - began_s, len(target_blocks))

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        raise InvalidRequest("KvTransferService.Pull is for byte paths like gloo; mock asks its network")

    async def close(self) -> None:
        self._closed = True
        self._network.channels.pop(self.address, None)

    async def _copy(self, mine: KvMemory, source: KvSource, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        peer, theirs = self._peer(source, mine)
        with peer._leases.reading(source.transfer_id, source.epoch, source_blocks):
            digests = block_digests(theirs, source_blocks) if self._digest else b""
            await asyncio.sleep(self.faults.delay_s)
            await self._bring(source, theirs, source_blocks, mine, target_blocks, digests)

    async def _copy_along(
        self,
        mine: KvMemory,
        source: KvSource,
        first_block: int,
        target_blocks: BlockIds,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Whole blocks, as they become ready. Faults count their bytes in order."""
        peer, theirs = self._peer(source, mine)
        allocation, progress = peer._leases.progress(source.transfer_id, source.epoch)
        if first_block < 0 or first_block + len(target_blocks) != len(allocation.block_ids):
            raise InvalidRequest(
                f"{len(target_blocks)} blocks from {first_block} on are not the rest of the "
                f"{len(allocation.block_ids)} leased ones"
            )
        cutter = SegmentCutter(first_block, progress.num_tokens, progress.block_size_tokens, num_layers=1)
        mark = None
        while not cutter.finished:
            mark = await asyncio.to_thread(progress.wait, mark, WAIT_S)
            for segment in cutter.cut(Watermark(mark.tokens)):
                here = slice(segment.first_block - first_block, segment.end_block - first_block)
                block_ids, into = allocation.block_ids[segment.first_block : segment.end_block], target_blocks[here]
                with peer._leases.reading(source.transfer_id, source.epoch, block_ids):
                    digests = block_digests(theirs, block_ids) if self._digest else b""
                    await self._bring(source, theirs, block_ids, mine, into, digests, here.start)
                on_bytes(len(into) * mine.block_bytes)

    async def _bring(
        self,
        source: KvSource,
        theirs: KvRegion,
        source_blocks: BlockIds,
        mine: KvMemory,
        target_blocks: BlockIds,
        digests: bytes,
        first: int = 0,
    ) -> None:
        """The blocks one by one, of which `first` came before, with what goes wrong on the way."""
        size = mine.block_bytes
        for n, block_id in enumerate(source_blocks.tolist()):
            await self._fail(source, (first + n) * size, size)
            sent = bytearray(theirs.block(block_id))
            at = self.faults.corrupt_at_byte
            if at is not None and at // size == first + n:
                sent[at % size] ^= 0xFF
            expected = digests[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES]
            fill(mine, target_blocks[n : n + 1], in_order(memoryview(sent), 1, size))
            if self._digest:
                verify_digests(xxhash.xxh3_64_digest(sent), expected, target_blocks[n : n + 1], source.transfer_id)

    def _peer(self, source: KvSource, mine: KvMemory) -> tuple[MockChannel, KvRegion]:
        """Who is at the source's address, and its pool. Raises PeerLost, LayoutMismatch."""
        peer = self._network.channels.get(source.data_address)
        if peer is None:
            raise PeerLost(f"transfer {source.transfer_id!r}: nobody is at {source.data_address!r}")
        theirs = peer._regions()
        if mine.block_bytes != theirs.block_bytes:
            raise LayoutMismatch(f"blocks have {mine.block_bytes} bytes here and {theirs.block_bytes} at the source")
        return peer, theirs

    async def _fail(self, source: KvSource, begin: int, size: int) -> None:
        """The fault that lies within the block of `size` bytes from offset `begin`, if any."""
        drop_at, stall_at = self.faults.drop_after_bytes, self.faults.stall_after_bytes
        if drop_at is not None and begin <= drop_at < begin + size:
            raise PeerLost(f"transfer {source.transfer_id!r}: source {source.worker_id!r} was lost")
        if stall_at is not None and begin <= stall_at < begin + size:
            await asyncio.Event().wait()
