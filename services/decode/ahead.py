"""Pulls that begin while prefill computes, before the Decode call they are for.

reserved ── start ──► pulling ──► here, or failed ── take ──► the Decode call owns the blocks
                         └── drop (released, cancelled, superseded, too late) ──► freed once nobody writes to them
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

import numpy as np

from sagellm_common.comm_backend.handoff import HandoffTarget
from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.errors import KvCorrupt, LayoutMismatch, LeaseExpired, SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvSource
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from services.decode.jobs import PullAheadJob, Transfer
from services.decode.pull import KvPuller

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Ahead:
    """One pull that began before its Decode call. `bytes_here` grows, on the channel's thread.

    When it is called for, the time and the bytes that are here by then are noted.
    """

    job: PullAheadJob
    allocation: Allocation
    began_s: float
    bytes_here: int = 0
    called_s: float = 0.0
    bytes_at_call: int = 0
    task: asyncio.Task[TransferResult] = field(init=False)
    expiry: asyncio.TimerHandle | None = None

    def transfer(self, source: KvSource, num_tokens: int) -> Transfer | None:
        """What was pulled of the prompt's num_tokens, counted as valid from now on; None: it is to be pulled again.

        Once it is over. Raises KvCorrupt.
        """
        error = None if self.task.cancelled() else self.task.exception()
        if isinstance(error, KvCorrupt):
            raise error
        if error is not None or self.task.cancelled() or not self._serves(source):
            why = error or "its source has computed it in other blocks"
            # Another layout is no mishap: it is so for each request between the two.
            level = logging.DEBUG if isinstance(error, LayoutMismatch) else logging.WARNING
            log.log(level, "request %s: KV pulled ahead is of no use, pulling it again: %s", self.job.request_id, why)
            return None
        result, num_blocks = self.task.result(), len(source.block_table)
        self.allocation.num_cached_tokens = min(source.num_tokens, num_tokens)
        return Transfer(
            bytes=result.bytes,
            transfer_ms=result.seconds * 1e3,
            blocks=result.blocks,
            blocks_reused=num_blocks - result.blocks,
            backend=source.backend,
            bytes_ahead=self.bytes_at_call,
            began_ahead_ms=(self.called_s - self.began_s) * 1e3,
        )

    def _serves(self, source: KvSource) -> bool:
        """Whether this is the source it was pulled from, and in the same blocks."""
        mine = self.job.source
        same = all(
            getattr(mine, name) == getattr(source, name)
            for name in ("worker_id", "incarnation", "transfer_id", "epoch", "num_tokens")
        )
        return same and np.array_equal(mine.block_table, source.block_table)

    def count(self, num_bytes: int) -> None:
        self.bytes_here += num_bytes


class PullsAhead:
    """At most one per request. It owns the blocks of the reservation it began on, until they are taken or dropped.

    A pull that is over waits for its Decode call as long as a reservation would.
    """

    def __init__(self, pool: KVBackendProtocol, reservations: HandoffTarget, puller: KvPuller) -> None:
        self._pool = pool
        self._reservations = reservations
        self._puller = puller
        self._entries: dict[str, Ahead] = {}
        self._dropped: set[Ahead] = set()
        """Told to end, their blocks not free yet."""

    def __len__(self) -> int:
        return len(self._entries) + len(self._dropped)

    def start(self, job: PullAheadJob) -> None:
        """Begins to fill the reserved blocks. Without a reservation nothing happens: it was released meanwhile."""
        try:
            allocation = self._reservations.claim(job.request_id, job.attempt)
        except LeaseExpired as err:
            log.info("request %s attempt %d is not pulled ahead: %s", job.request_id, job.attempt, err.message)
            return
        self.drop(job.request_id, job.attempt)
        ahead = self._entries[job.request_id] = Ahead(job, allocation, time.monotonic())
        pull = self._puller.pull_ahead(job, allocation, ahead.count)
        ahead.task = asyncio.create_task(pull, name=f"pull-ahead-{job.request_id}/{job.attempt}")
        ahead.task.add_done_callback(lambda _: self._over(ahead))

    def find(self, request_id: str, attempt: int) -> Ahead | None:
        ahead = self._entries.get(request_id)
        return ahead if ahead is not None and ahead.job.attempt == attempt else None

    async def take(self, ahead: Ahead) -> Allocation:
        """Waits until the pull is over, whatever came of it; the caller owns the blocks then.

        Raises LeaseExpired when it was dropped meanwhile. Cancelling the wait drops it.
        """
        ahead.called_s, ahead.bytes_at_call = time.monotonic(), ahead.bytes_here
        request_id, attempt = ahead.job.request_id, ahead.job.attempt
        try:
            await asyncio.wait([ahead.task])
        except BaseException:
            self.drop(request_id, attempt)
            raise
        if self.find(request_id, attempt) is not ahead:
            raise LeaseExpired(f"request {request_id} attempt {attempt} was released while its KV was pulled")
        self._forget(ahead)
        return ahead.allocation

    def drop(self, request_id: str, attempt: int) -> None:
        """Ends the pull of this attempt or an older one. A no-op for unknown ones."""
        ahead = self._entries.get(request_id)
        if ahead is not None and ahead.job.attempt <= attempt:
            self._drop(ahead)

    def close(self) -> None:
        """Drops all of them. Idempotent."""
        for ahead in list(self._entries.values()):
            self._drop(ahead)

    def _drop(self, ahead: Ahead) -> None:
        self._forget(ahead)
        if ahead.task.done():
            self._pool.free(ahead.allocation)
        else:
            self._dropped.add(ahead)
            ahead.task.cancel()

    def _forget(self, ahead: Ahead) -> None:
        del self._entries[ahead.job.request_id]
        if ahead.expiry is not None:
            ahead.expiry.cancel()

    def _over(self, ahead: Ahead) -> None:
        """Nobody writes to the blocks any more."""
        if not ahead.task.cancelled() and (error := ahead.task.exception()) is not None:
            expected = isinstance(error, SageError)
            level, trace = (logging.INFO, None) if expected else (logging.ERROR, error)
            log.log(level, "request %s: pulling ahead failed: %s", ahead.job.request_id, error, exc_info=trace)
        if ahead in self._dropped:
            self._dropped.discard(ahead)
            self._pool.free(ahead.allocation)
        elif self._entries.get(ahead.job.request_id) is ahead:
            loop, ttl_s = asyncio.get_running_loop(), self._reservations.ttl_s
            ahead.expiry = loop.call_later(ttl_s, self.drop, ahead.job.request_id, ahead.job.attempt)
