"""The Mooncake byte path: the receiver reads the source's blocks through Mooncake's Transfer Engine.

    receiver  pull ──► request ──────────────────────────► lease held; where the blocks are, their digests
                       engine reads into a staging slot ◄───────────────┤ (the source's CPU only answers its engine)
                       slot → own blocks, group by group                │
                       all read ─────────────────────────► lease was held until here

The request travels on a connection of its own (`mooncake_source`): it ends when the source dies, which the engine
would notice late, and while it lives the source holds the lease. Why there is a staging slot: `mooncake_engine`.

Engines let whoever can connect to their ports read and write the pool, without a lease: for trusted networks only.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.mooncake_engine import (
    MAX_READS,
    SLOT_BYTES,
    Engine,
    Slot,
    acquire,
    release,
)
from sagellm_common.comm_backend.backends.mooncake_source import ALL_READ, GROUP_READ, READING, MooncakeSource
from sagellm_common.comm_backend.bridge import fill
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.daemon import in_daemon_thread
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.integrity import DIGEST_BYTES, check_pull, verify_digests
from sagellm_common.comm_backend.meter import PullMeter
from sagellm_common.comm_backend.pieces import digests, in_order
from sagellm_common.comm_backend.protocol import LeasedBlocks, Pull, PullAlong, Regions, TransferResult, check_encoding
from sagellm_common.comm_backend.wire import split_address
from sagellm_common.comm_backend.write_gate import WriteGate
from sagellm_common.core.errors import Draining, InvalidRequest, PeerLost, error_for
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource


def open_channel(end: End) -> MooncakeChannel:
    """Raises ConfigError where the engine is not installed, or cannot be loaded."""
    return MooncakeChannel.over("tcp", "mooncake", end)


class MooncakeChannel:
    """A `KVTransferChannel`. `silence_s` bounds each wait for a peer, a pull's own timeout the whole of it."""

    pulls_along = False
    encodes = False

    def __init__(
        self,
        name: str,
        engine: Engine,
        regions: Regions,
        leases: LeasedBlocks,
        host: str,
        port: int,
        *,
        digest: bool,
        silence_s: float,
        settings: KVTransportConfig,
    ) -> None:
        self.name = name
        self.address = ""
        self._engine = engine
        self._regions = regions
        self._source = MooncakeSource(regions, leases, silence_s, host, port, engine, settings)
        self._digest = digest
        self._silence_s = silence_s
        self._closed = False

    @classmethod
    def over(cls, protocol: str, name: str, end: End) -> MooncakeChannel:
        cfg, regions = end.config, end.in_place()
        engine = acquire(protocol, end.host)
        return cls(
            name,
            engine,
            regions,
            end.leases,
            end.host,
            end.port,
            digest=cfg.digest,
            silence_s=cfg.timeout_s,
            settings=end.planner().settings,
        )

    async def start(self) -> str:
        self.address = self._source.start()
        return self.address

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._source.close)
            release(self._engine)

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        raise InvalidRequest(f"over {self.name} nothing is pulled along the computation: whole blocks are read at once")

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        raise InvalidRequest(
            f"KvTransferService.Pull is for byte paths like gloo; over {self.name} the receiver asks in band"
        )

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
                    await self._pull(memory, asked, began_s + asked.timeout_s)
            except (OSError, EOFError, MalformedFrame) as err:
                raise PeerLost(
                    f"transfer {source.transfer_id!r}: source {source.worker_id!r} at {source.data_address} was lost: "
                    f"{err or 'it was silent'}"
                ) from err
        num_bytes = len(target_blocks) * memory.block_bytes
        return TransferResult(num_bytes, time.monotonic() - began_s, len(target_blocks))

    async def _pull(self, memory: KvMemory, asked: Pull, deadline_s: float) -> None:
        source, source_blocks, target_blocks = asked.source, asked.source_blocks, asked.target_blocks
        request = frames.encode_pull(
            source.transfer_id,
            source.epoch,
            source_blocks,
            block_bytes=memory.block_bytes,
            digest=self._digest,
            timeout_s=deadline_s - time.monotonic(),
        )
        host, port = _host_and_port(source)
        async with asyncio.timeout(self._silence_s):
            reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(request)
            async with asyncio.timeout(self._silence_s):
                peer, address = await _accepted(reader)
            num_bytes = DIGEST_BYTES * len(source_blocks) if self._digest else 0
            # Read along: it ends at once when the source dies, which the engine would notice late.
            rest = asyncio.ensure_future(_digests(reader, num_bytes))
            write = _Writing(memory, target_blocks, meter.current(), digest=self._digest)
            reading = _Reading(self._engine, peer, write, self._silence_s, deadline_s)
            loop = asyncio.get_running_loop()
            job = in_daemon_thread(
                "kv-mooncake",
                lambda: reading.run(
                    _runs(address, source_blocks, memory.block_bytes),
                    lambda: loop.call_soon_threadsafe(writer.write, GROUP_READ),
                ),
            )
            both: set[asyncio.Future[Any]] = {job, rest}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if rest.done():
                    rest.result()
                    raise MalformedFrame("ended before all blocks were read")
                await job
                writer.write(ALL_READ)
                async with asyncio.timeout(self._silence_s):
                    told = await rest
            finally:
                reading.give_up()
                for future in both:
                    future.cancel()
                    future.add_done_callback(_retrieve)
        finally:
            # Not awaited: the source may be gone.
            writer.transport.abort()
        if self._digest:
            verify_digests(write.digests(), told, target_blocks, source.transfer_id)


class _Writing:
    """Where one pull's blocks go, as long as nobody has shut it."""

    def __init__(self, memory: KvMemory, targets: BlockIds, metered: PullMeter, *, digest: bool) -> None:
        self.size = memory.block_bytes
        self._memory, self._targets, self._metered = memory, targets, metered
        self._digests: list[bytes] | None = [] if digest else None
        self._gate = WriteGate()

    def shut(self) -> None:
        self._gate.shut()

    def digests(self) -> bytes:
        """Of the blocks that were written, in order."""
        return b"".join(self._digests or ())

    def copy(self, slot: Slot, which: slice) -> None:
        """Those of the blocks that lie at the slot's beginning."""
        targets = self._targets[which]
        staged = in_order(slot.memory, len(targets), self.size)
        if self._digests is not None:
            with self._metered.digesting():
                self._digests.append(digests(staged))
        with self._gate:
            if self._gate.open:
                fill(self._memory, targets, staged)
                self._metered.arrived(len(targets) * self.size, len(targets))


class _Reading:
    """One pull's reads, on a thread that may be left behind: after `give_up` it writes to no block any more."""

    def __init__(self, engine: Engine, peer: str, into: _Writing, silence_s: float, deadline_s: float) -> None:
        self._engine = engine
        self._peer = peer
        self._into = into
        self._silence_s = silence_s
        self._deadline_s = deadline_s
        self._stop = threading.Event()

    def give_up(self) -> None:
        self._stop.set()
        self._into.shut()

    def run(self, reads: list[tuple[int, int]], on_group: Callable[[], object]) -> None:
        """Group by group: one is copied to its blocks while the next is on its way. Raises as `Engine.reading`."""
        size = self._into.size
        groups = list(_groups(reads, size))
        with self._engine.slots(size) as slots:
            here, end = slice(0, 0), 0
            for n, group in enumerate(groups):
                deadline_s = min(self._deadline_s, time.monotonic() + self._silence_s)
                with self._engine.reading(self._peer, group, slots[n % 2], deadline_s, self._stop):
                    if n:
                        self._into.copy(slots[(n + 1) % 2], here)
                here = slice(end, end := end + sum(num_bytes for _, num_bytes in group) // size)
                on_group()
            self._into.copy(slots[(len(groups) - 1) % 2], here)


def _runs(address: int, block_ids: BlockIds, size: int) -> list[tuple[int, int]]:
    """Where in the source's memory the blocks are, neighbours as one: (address, bytes)."""
    cuts = np.flatnonzero(np.diff(block_ids) != 1) + 1
    bounds = [0, *cuts.tolist(), len(block_ids)]
    return [(address + int(block_ids[a]) * size, (b - a) * size) for a, b in itertools.pairwise(bounds)]


def _groups(runs: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """The runs in groups that fit a slot, of at most MAX_READS each; a long run is cut between blocks."""
    room_bytes = max(SLOT_BYTES // size, 1) * size
    group: list[tuple[int, int]] = []
    free = room_bytes
    for start, left in runs:
        while left:
            part = min(left, free)
            group.append((start, part))
            start, left, free = start + part, left - part, free - part
            if not free or len(group) == MAX_READS:
                yield group
                group, free = [], room_bytes
    if group:
        yield group


async def _accepted(reader: asyncio.StreamReader) -> tuple[str, int]:
    """The source's engine and the address of its block 0. Raises what the source refused with."""
    accepted, reason_bytes, message_bytes = frames.decode_answer(await reader.readexactly(frames.ANSWER.size))
    if not accepted:
        reason = (await reader.readexactly(reason_bytes)).decode(errors="replace")
        raise error_for(reason, (await reader.readexactly(message_bytes)).decode(errors="replace"))
    name_bytes, address = READING.unpack(await reader.readexactly(READING.size))
    return (await reader.readexactly(name_bytes)).decode(errors="replace"), address


async def _digests(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
    """Of all blocks; returned once the source has said that it held the lease until the end."""
    digests = await reader.readexactly(num_bytes)
    trailer = await reader.readexactly(len(frames.TRAILER))
    if trailer != frames.TRAILER:
        raise MalformedFrame(f"ended with {trailer!r}")
    return digests


def _host_and_port(source: KvSource) -> tuple[str, int]:
    try:
        return split_address(source.data_address)
    except ValueError as err:
        raise PeerLost(f"transfer {source.transfer_id!r}: source {source.worker_id!r}: {err}") from err


def _retrieve(future: asyncio.Future[Any]) -> None:
    """An error that nobody needs any more has been seen."""
    if not future.cancelled():
        future.exception()
