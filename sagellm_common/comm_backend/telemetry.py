"""Prometheus metrics of the byte paths, as wrappers: the algorithms know nothing of them."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import AbstractContextManager
from types import TracebackType

from prometheus_client import Counter, Histogram

from sagellm_common.comm_backend.handoff_record import HandoffRecord
from sagellm_common.comm_backend.meter import PullMeter, digested_s, metering
from sagellm_common.comm_backend.protocol import (
    KVTransferChannel,
    LeasedBlocks,
    Memory,
    Pull,
    PullAlong,
    TransferResult,
)
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds

TRANSFER_BYTES = Counter(
    "sagellm_comm_transfer_bytes_total",
    "KV bytes moved; direction is in (pulled) or out (served)",
    ["backend", "direction"],
)
TRANSFER_SECONDS = Histogram(
    "sagellm_comm_transfer_seconds",
    "Time in which one pull moved bytes, as the receiver sees it",
    ["backend"],
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
TRANSFER_FAILURES = Counter(
    "sagellm_comm_transfer_failures_total", "Pulls that ended in an error", ["backend", "error"]
)

_RATIO = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

BANDWIDTH = Histogram(
    "sagellm_comm_bandwidth_bytes_per_second",
    "Of each pull, over the time in which its bytes moved",
    ["backend"],
    buckets=(1e6, 1e7, 3e7, 1e8, 3e8, 1e9, 2e9, 4e9, 8e9, 1.6e10, 3.2e10, 6.4e10),
)
FIRST_BYTE_SECONDS = Histogram(
    "sagellm_comm_first_byte_seconds",
    "From the beginning of a pull until its first piece was here",
    ["backend"],
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
STALLS = Counter("sagellm_comm_stalls_total", "Pieces of a pull that were waited for longer than 100 ms", ["backend"])
DIGEST_SECONDS = Counter("sagellm_comm_digest_seconds_total", "Spent on checking what was pulled", ["backend"])
SOURCE_DIGEST_SECONDS = Counter(
    "sagellm_comm_source_digest_seconds_total", "Spent by sources on digests of what they sent", ["backend"]
)
FUSION_HITS = Counter("sagellm_comm_fusion_hits_total", "Messages saved by sending blocks together", ["backend"])
RETRIES = Counter("sagellm_comm_retries_total", "Pulls of the same KV again", ["backend"])
HANDOFFS = Counter(
    "sagellm_comm_handoffs_total", "Handoffs as decode saw them end: done, or the reason they failed", ["outcome"]
)
OVERLAP_RATIO = Histogram(
    "sagellm_comm_overlap_ratio", "Transfer time hidden behind computation / transfer time", buckets=_RATIO
)
REQUEST_SHARE = Histogram(
    "sagellm_comm_request_share_ratio", "Exposed transfer time / duration of the Decode call", buckets=_RATIO
)


def observe_handoff(record: HandoffRecord | None) -> None:
    """Counts a target's record that has ended; None: there is nothing to count."""
    if record is None:
        return
    HANDOFFS.labels(record.reason.value if record.reason is not None else record.state.value).inc()
    RETRIES.labels(record.backend).inc(record.retries)
    if record.reason is None and record.transfer_ms:
        OVERLAP_RATIO.observe(record.overlap_share)


class InstrumentedChannel:
    """A channel whose pulls are counted and timed."""

    def __init__(self, inner: KVTransferChannel) -> None:
        self._inner = inner
        self.name = inner.name
        self.pulls_along = inner.pulls_along
        self.encodes = inner.encodes
        # Looked up once: that takes as long as counting does.
        self._bytes = TRANSFER_BYTES.labels(self.name, "in")
        self._seconds, self._bandwidth = TRANSFER_SECONDS.labels(self.name), BANDWIDTH.labels(self.name)
        self._first_byte, self._digest = FIRST_BYTE_SECONDS.labels(self.name), DIGEST_SECONDS.labels(self.name)
        self._stalls, self._fused = STALLS.labels(self.name), FUSION_HITS.labels(self.name)

    @property
    def address(self) -> str:
        return self._inner.address

    async def start(self) -> str:
        return await self._inner.start()

    async def pull(self, asked: Pull) -> TransferResult:
        return await self._measured(self._inner.pull(asked))

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        return await self._measured(self._inner.pull_along(asked))

    async def _measured(self, pulling: Awaitable[TransferResult]) -> TransferResult:
        with metering() as meter:
            try:
                return self._counted(await pulling, meter)
            except BaseException as err:
                TRANSFER_FAILURES.labels(self.name, type(err).__name__).inc()
                raise
            finally:
                self._count(meter)

    def _count(self, meter: PullMeter) -> None:
        if meter.stalls:
            self._stalls.inc(meter.stalls)
        if meter.messages_saved:
            self._fused.inc(meter.messages_saved)
        if meter.digest_s:
            self._digest.inc(meter.digest_s)
        if meter.first_byte_s is not None:
            self._first_byte.observe(meter.first_byte_s)

    def _counted(self, result: TransferResult, meter: PullMeter) -> TransferResult:
        if result.bytes and not meter.bytes:  # the byte path reports nothing on its way
            meter.arrived(result.bytes)
        if result.bytes and result.seconds > 0:
            self._bandwidth.observe(result.bytes / result.seconds)
        self._bytes.inc(result.bytes)
        self._seconds.observe(result.seconds)
        return result

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        return await self._inner.serve_pull(transfer_id, epoch, block_ids, pair_id)

    async def close(self) -> None:
        await self._inner.close()


class _Counted(AbstractContextManager[None]):
    def __init__(self, reading: AbstractContextManager[None], sent: Counter, digest: Counter, num_bytes: int) -> None:
        self._reading, self._sent, self._digest, self._num_bytes = reading, sent, digest, num_bytes

    def __enter__(self) -> None:
        self._reading.__enter__()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._reading.__exit__(kind, err, tb)
        self._digest.inc(digested_s())
        if kind is None:
            self._sent.inc(self._num_bytes)


class InstrumentedLeases:
    """A lease table whose completed reads are counted: that is what the source has sent, on any byte path."""

    def __init__(self, inner: LeasedBlocks, backend: str, memory: Memory) -> None:
        self._inner = inner
        self._sent = TRANSFER_BYTES.labels(backend, "out")
        self._digest = SOURCE_DIGEST_SECONDS.labels(backend)
        self._memory = memory

    def reading(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        size = len(block_ids) * self._memory().block_bytes if num_bytes is None else num_bytes
        return _Counted(self._inner.reading(transfer_id, epoch, block_ids, size), self._sent, self._digest, size)

    def progress(self, transfer_id: str, epoch: int) -> tuple[Allocation, KvProgress]:
        return self._inner.progress(transfer_id, epoch)
