"""Blocks copied from tier to tier, many at a time, while whoever wanted it does something else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sagellm_common.core import shared_memory
from sagellm_common.core.kv import KvRegion
from sagellm_common.kv_runtime.backends.host_tier import HostTier
from sagellm_common.kv_runtime.tiers import BlockKey, TierBackend

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """Copies of `keys` from one tier to another, in this order. Tiers count from 0, the fastest."""

    source: int
    target: int
    keys: tuple[BlockKey, ...]


class Migration:
    """A plan being carried out, chunk by chunk."""

    def __init__(self, plan: MigrationPlan, num_chunks: int) -> None:
        self.plan = plan
        self.cancelled = False
        self.blocks_done = 0
        """Tried, whether they were there or not."""
        self.blocks_present = 0
        """Of these, in the target now."""
        self._chunks_left = num_chunks
        self._lock = threading.Lock()
        self._ended = threading.Event()
        if not num_chunks:
            self._ended.set()

    def cancel(self) -> None:
        """No further chunk is copied. What has been stays. Idempotent."""
        self.cancelled = True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until nothing is copied any more; False: not within timeout_s."""
        return self._ended.wait(timeout_s)

    def chunk_ended(self, tried: int = 0, present: int = 0) -> None:
        with self._lock:
            self.blocks_done += tried
            self.blocks_present += present
            self._chunks_left -= 1
            if not self._chunks_left:
                self._ended.set()


class KVMigrator:
    """At most `threads` chunks of `chunk_bytes` are under way, whatever was asked for.

    A chunk is copied whole, or up to the first block that its source lacks or its target has no room for. Blocks that
    the target has already are not copied again, so a plan may be carried out twice.
    """

    def __init__(
        self,
        tiers: Sequence[TierBackend],
        *,
        threads: int = 4,
        chunk_bytes: int = CHUNK_BYTES,
        on_copied: Callable[[int, int, int, float], None] = lambda source, target, num_bytes, seconds: None,
    ) -> None:
        """`on_copied` hears of each chunk: source, target, bytes that are there, and the time it took."""
        self._tiers = tiers
        self._on_copied = on_copied
        self._chunk_bytes = chunk_bytes
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kv-migrate")
        self._closed = False

    @property
    def chunk_blocks(self) -> int:
        return max(1, self._chunk_bytes // self._tiers[0].block_bytes)

    def migrate(self, plan: MigrationPlan) -> Migration:
        """Returns at once. Raises RuntimeError after `close`."""
        size = self.chunk_blocks
        chunks = [plan.keys[at : at + size] for at in range(0, len(plan.keys), size)]
        migration = Migration(plan, len(chunks))
        for chunk in chunks:
            self._threads.submit(self._chunk, migration, chunk)
        return migration

    def close(self) -> None:
        """Waits for the chunks under way; of the others nothing is copied. Idempotent."""
        self._closed = True
        self._threads.shutdown()

    def _chunk(self, migration: Migration, keys: Sequence[BlockKey]) -> None:
        tried = present = 0
        try:
            if not migration.cancelled and not self._closed:
                tried, began_s = len(keys), time.monotonic()
                source, target = migration.plan.source, migration.plan.target
                present = self._copy(self._tiers[source], self._tiers[target], keys)
                num_bytes = present * self._tiers[source].block_bytes
                self._on_copied(source, target, num_bytes, time.monotonic() - began_s)
        except Exception:
            log.exception("%d blocks were not copied to another tier", len(keys))
        finally:
            migration.chunk_ended(tried, present)

    def _copy(self, source: TierBackend, target: TierBackend, keys: Sequence[BlockKey]) -> int:
        """In place where one of the two is memory; returns how many blocks the target has of what was copied."""
        if isinstance(source, HostTier):
            with source.holding([key.hash for key in keys]) as (held, region, block_ids):
                return target.write(held, region, block_ids)
        if isinstance(target, HostTier):
            with target.filling(keys) as filling:
                filling.num_filled = source.read(filling.keys, filling.region, filling.block_ids)
            return sum(target.holds([key.hash for key in keys]))
        size = source.block_bytes
        memory = shared_memory.allocate(len(keys) * size)  # begins with a page, as direct I/O wants it
        staged, ids = KvRegion(memoryview(memory.arena), size, len(keys)), np.arange(len(keys), dtype=np.int32)
        count = source.read(keys, staged, ids)
        return target.write(keys[:count], staged, ids[:count])
