"""Brings a prompt's KV from the worker that computed it into blocks of our own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from sagellm_common.comm_backend.handoff_record import HandoffLog, Pulling
from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.comm_backend.telemetry import observe_handoff
from sagellm_common.comm_backend.token_pull import LinkSpeed, TokenPuller
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.telemetry import span
from sagellm_common.core.types import KvLayout, KvSource
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.worker_service import WorkerView
from services.decode.jobs import DecodeJob, PullAheadJob, Transfer

log = logging.getLogger(__name__)


class KvPuller:
    def __init__(
        self,
        channel: PathsChannel,
        transfers: KvTransferClient,
        releaser: LeaseReleaser,
        worker: WorkerView,
        pool: KVBackendProtocol,
        settings: Callable[[], TransportConfig],
        handoffs: HandoffLog,
        link_speed: LinkSpeed | None = None,
    ) -> None:
        self._tokens = TokenPuller(channel, pool.regions(), pool.layout, settings, link_speed)
        self._channel = channel
        self._transfers = transfers
        self._releaser = releaser
        self._worker = worker
        self._layout = pool.layout
        self._handoffs = handoffs

    @contextmanager
    def lease(self, source: KvSource) -> Iterator[None]:
        """The source learns how the block ended: committed, or cancelled when it raised."""
        committed = False
        try:
            yield
            committed = True
        finally:
            self._releaser.release(source, committed)

    async def pull(self, job: DecodeJob, source: KvSource, allocation: Allocation) -> Transfer:
        """Fills the blocks that are not valid yet and raises `allocation.num_cached_tokens` to what is ready.

        Raises LayoutMismatch, ConfigError (another byte path), QueueFull, PeerLost, LeaseExpired, KvCorrupt.
        """
        with self._handoffs.pulling(job.request_id, job.attempt, source, "pull") as pulling:
            theirs = await self._handshake(source)
            pulling.agreed()
            return await self._pull(job, source, theirs, allocation, pulling)

    async def _pull(
        self, job: DecodeJob, source: KvSource, theirs: KvLayout, allocation: Allocation, pulling: Pulling
    ) -> Transfer:
        size = self._layout.block_size_tokens
        # One token at least is the engine's to compute; and a generation may have outgrown what was reserved for it.
        most = min(len(job.prompt) + len(job.emitted) - 1, len(allocation.block_ids) * size)
        ready = min(self._ready_tokens(source), most)
        begin = self._first_missing(allocation)
        end = -(-ready // size)
        if begin >= end:
            return Transfer(0, 0.0, 0, end, self._channel.name)
        async with self.renewed(source):
            pulling.result = result = await self._tokens.pull(
                source,
                theirs,
                allocation.block_ids,
                begin * size,
                ready,
                timeout_s=job.timeout_s,
                priority=job.priority,
                wire_dtype=self._planned(job),
            )
        allocation.num_cached_tokens = ready
        return Transfer.of(result, begin, self._channel.name)

    def received(self, job: DecodeJob, transfer: Transfer) -> None:
        """All of the prompt's KV is here, and counts."""
        record = self._handoffs.done(
            job.request_id,
            job.attempt,
            blocks=transfer.blocks,
            reused=transfer.blocks_reused,
            transfer_ms=transfer.transfer_ms,
            exposed_ms=transfer.exposed_ms,
            ahead_share=transfer.bytes_ahead / transfer.bytes if transfer.bytes else 0.0,
        )
        observe_handoff(record)

    async def pull_ahead(
        self, job: PullAheadJob, allocation: Allocation, on_bytes: Callable[[int], None]
    ) -> TransferResult:
        """As `pull`, of blocks that the source is still computing: returns when all of them are here.

        `allocation.num_cached_tokens` stays: what is here counts once the Decode call says it is from this source.
        Raises LayoutMismatch for another layout over a byte path that only brings it when all is computed.
        """
        source = job.source
        with (
            span(
                "pull_ahead",
                job.trace_context,
                request_id=job.request_id,
                source=source.worker_id,
                backend=source.backend,
            ) as current,
            self._handoffs.pulling(job.request_id, job.attempt, source, "pull ahead") as pulling,
        ):
            theirs = await self._handshake(source)
            pulling.agreed()
            begin = self._first_missing(allocation)
            pulling.result = result = await self._tokens.pull_along(
                source,
                theirs,
                allocation.block_ids,
                begin * self._layout.block_size_tokens,
                timeout_s=job.timeout_s,
                on_bytes=on_bytes,
                priority=job.priority,
                wire_dtype=self._planned(job),
            )
            moved = {"bytes": result.bytes, "blocks": result.blocks, "moving_ms": result.seconds * 1e3}
            current.set_attributes({**moved, "blocks_reused": begin})
            return result

    async def _handshake(self, source: KvSource) -> KvLayout:
        me = self._worker.record
        return await self._transfers.handshake(
            source, worker_id=me.worker_id, incarnation=me.incarnation, layout=self._layout
        )

    def _planned(self, job: DecodeJob | PullAheadJob) -> str:
        """The plan's wire dtype. Who has set another one here meanwhile (`transport set`) knew what the plans say."""
        changed = any(change.key == "wire_dtype" for change in self._channel.settings.changes())
        return "" if changed else job.wire_dtype

    def _first_missing(self, allocation: Allocation) -> int:
        """The first block that is to be filled."""
        return max(allocation.num_cached_tokens // self._layout.block_size_tokens, allocation.num_shared_blocks)

    def _ready_tokens(self, source: KvSource) -> int:
        """Below the watermark all layers are there; above it nothing may be read."""
        return min(source.tokens_ready, source.num_tokens) if source.layers_ready >= self._layout.num_layers else 0

    @asynccontextmanager
    async def renewed(self, source: KvSource) -> AsyncIterator[None]:
        """Keeps the source's lease alive for the time of the block, which is seldom long enough to need it."""
        renewing: list[asyncio.Task[None]] = []

        def begin() -> None:
            renewing.append(asyncio.create_task(self._renew(source), name=f"renew-{source.transfer_id}"))

        delay_s = _before(source.lease_expires_in_ms / 1e3)
        timer = asyncio.get_running_loop().call_later(delay_s, begin)
        try:
            yield
        finally:
            timer.cancel()
            for task in renewing:
                task.cancel()
                await asyncio.wait([task])

    async def _renew(self, source: KvSource) -> None:
        """A renewal that fails is no error of its own: the pull finds out for itself."""
        try:
            while True:
                left_s = await self._transfers.renew(source)
                await asyncio.sleep(_before(left_s))
        except SageError as err:
            log.info("transfer %s: the lease could not be renewed: %s", source.transfer_id, err)


def _before(left_s: float) -> float:
    """Seconds until a lease with so many left is renewed: early enough to try again."""
    return max(left_s / 3, 0.05)
