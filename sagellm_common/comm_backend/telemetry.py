"""Prometheus metrics of the byte paths, as wrappers: the algorithms know nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Histogram

from sagellm_common.comm_backend.protocol import Encoding, KVTransferChannel, LeasedBlocks, Memory, TransferResult
from sagellm_common.core.kv import Allocation, KvMemory
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds, KvSource

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


class InstrumentedChannel:
    """A channel whose pulls are counted and timed."""

    def __init__(self, inner: KVTransferChannel) -> None:
        self._inner = inner
        self.name = inner.name
        self.pulls_along = inner.pulls_along
        self.encodes = inner.encodes

    @property
    def address(self) -> str:
        return self._inner.address

    async def start(self) -> str:
        return await self._inner.start()

    async def pull(
        self,
        source: KvSource,
        source_blocks: BlockIds,
        target_blocks: BlockIds,
        *,
        timeout_s: float,
        into: KvMemory | None = None,
        encoding: Encoding | None = None,
    ) -> TransferResult:
        with self._failures():
            result = await self._inner.pull(
                source, source_blocks, target_blocks, timeout_s=timeout_s, into=into, encoding=encoding
            )
        return self._counted(result)

    async def pull_along(
        self,
        source: KvSource,
        first_block: int,
        target_blocks: BlockIds,
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None],
        into: KvMemory | None = None,
        encoding: Encoding | None = None,
    ) -> TransferResult:
        with self._failures():
            result = await self._inner.pull_along(
                source,
                first_block,
                target_blocks,
                timeout_s=timeout_s,
                on_bytes=on_bytes,
                into=into,
                encoding=encoding,
            )
        return self._counted(result)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException as err:
            TRANSFER_FAILURES.labels(self.name, type(err).__name__).inc()
            raise

    def _counted(self, result: TransferResult) -> TransferResult:
        TRANSFER_BYTES.labels(self.name, "in").inc(result.bytes)
        TRANSFER_SECONDS.labels(self.name).observe(result.seconds)
        return result

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        return await self._inner.serve_pull(transfer_id, epoch, block_ids, pair_id)

    async def close(self) -> None:
        await self._inner.close()


class InstrumentedLeases:
    """A lease table whose completed reads are counted: that is what the source has sent, on any byte path."""

    def __init__(self, inner: LeasedBlocks, backend: str, memory: Memory) -> None:
        self._inner = inner
        self._sent = TRANSFER_BYTES.labels(backend, "out")
        self._memory = memory

    @contextmanager
    def reading(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int | None = None
    ) -> Iterator[None]:
        with self._inner.reading(transfer_id, epoch, block_ids, num_bytes):
            yield
        self._sent.inc(len(block_ids) * self._memory().block_bytes if num_bytes is None else num_bytes)

    def progress(self, transfer_id: str, epoch: int) -> tuple[Allocation, KvProgress]:
        return self._inner.progress(transfer_id, epoch)
