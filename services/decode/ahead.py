"""Pulls that begin while prefill computes, before the Decode call they are for.

reserved ── start ──► pulling ──► here, or failed ── take ──► the Decode call owns the blocks
                         └── drop (released, cancelled, superseded) ──► ended

The reservations own the blocks all along: whatever ends one of them, it is freed once nobody writes to it any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace

import numpy as np

from sagellm_common.comm_backend.handoff import HandoffTarget
from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.errors import KvCorrupt, LayoutMismatch, LeaseExpired, SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvSource
from services.decode.jobs import PullAheadJob, Transfer
from services.decode.pull import KvPuller

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Ahead:
    """One pull that began before its Decode call. `bytes_here` grows, on the channel's thread.

    When it is called for, the time and the bytes that are here by then are noted.
    """

    job: PullAheadJob
    began_s: float
    bytes_here: int = 0
    called_s: float = 0.0
    bytes_at_call: int = 0
    task: asyncio.Task[TransferResult] = field(init=False)

    def transfer(self, source: KvSource, num_tokens: int, allocation: Allocation) -> Transfer | None:
        """What was pulled of the prompt's num_tokens, counted as valid in `allocation` (which was taken) from now on;
        None: it is to be pulled again.

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
        result = self.task.result()
        allocation.num_cached_tokens = min(source.num_tokens, num_tokens)
        return replace(
            Transfer.of(result, len(allocation.block_ids) - result.blocks, source.backend),
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
    """At most one per request, into the blocks of its reservation, which waits as long for its Decode call as any."""

    def __init__(self, reservations: HandoffTarget, puller: KvPuller) -> None:
        self._reservations = reservations
        self._puller = puller
        self._entries: dict[str, Ahead] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def start(self, job: PullAheadJob) -> None:
        """Begins to fill the reserved blocks. Without a reservation nothing happens: it was released meanwhile."""
        if not self._reservations.holds(job.request_id, job.attempt):
            log.info("request %s attempt %d is not pulled ahead: nothing is reserved", job.request_id, job.attempt)
            return
        self._forget_ended()
        known = self._entries.get(job.request_id)
        if known is not None:
            known.task.cancel()
        ahead = self._entries[job.request_id] = Ahead(job, time.monotonic())
        ahead.task = asyncio.create_task(self._fill(ahead), name=f"pull-ahead-{job.request_id}/{job.attempt}")
        ahead.task.add_done_callback(lambda task: _report(job, task))

    async def _fill(self, ahead: Ahead) -> TransferResult:
        job = ahead.job
        with self._reservations.writing(job.request_id, job.attempt) as allocation:
            return await self._puller.pull_ahead(job, allocation, ahead.count)

    def find(self, request_id: str, attempt: int) -> Ahead | None:
        ahead = self._entries.get(request_id)
        return ahead if ahead is not None and ahead.job.attempt == attempt else None

    async def take(self, ahead: Ahead, subject: bytes = b"") -> Allocation:
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
        del self._entries[request_id]
        return self._reservations.claim(request_id, attempt, subject)

    def drop(self, request_id: str, attempt: int) -> None:
        """Ends the pull of this attempt or an older one, and its reservation. A no-op for unknown ones."""
        ahead = self._entries.get(request_id)
        if ahead is not None and ahead.job.attempt <= attempt:
            del self._entries[request_id]
            ahead.task.cancel()
            self._reservations.release(request_id, ahead.job.attempt)

    def close(self) -> None:
        """Drops all of them. Idempotent."""
        for ahead in list(self._entries.values()):
            self.drop(ahead.job.request_id, ahead.job.attempt)

    def _forget_ended(self) -> None:
        """Those nobody has come for before their reservation expired."""
        for request_id, ahead in list(self._entries.items()):
            if ahead.task.done() and not self._reservations.holds(request_id, ahead.job.attempt):
                del self._entries[request_id]


def _report(job: PullAheadJob, task: asyncio.Task[TransferResult]) -> None:
    """Nobody may ever ask how it ended."""
    if not task.cancelled() and (error := task.exception()) is not None:
        expected = isinstance(error, SageError)
        level, trace = (logging.INFO, None) if expected else (logging.ERROR, error)
        log.log(level, "request %s: pulling ahead failed: %s", job.request_id, error, exc_info=trace)
