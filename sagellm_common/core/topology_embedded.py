"""The topology of one machine: a table in the router's process, with leases on the injected clock."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sagellm_common.core.clock import Clock, SystemClock
from sagellm_common.core.errors import LeaseExpired, WorkerIdTaken
from sagellm_common.core.registration import open_registration
from sagellm_common.core.topology import LinkCost, Registration, SnapshotFeed, TopologySnapshot
from sagellm_common.core.types import WorkerRecord

TICK_S = 0.1
"""How often expired leases are looked for; a worker is gone at most this long after its lease."""


@dataclass(slots=True)
class _Entry:
    record: WorkerRecord
    lease_id: str
    ttl_s: float
    expires_at: float
    links: dict[str, LinkCost] = field(default_factory=dict)
    """To this worker, by source."""


class EmbeddedTopology:
    """Both a TopologyStore and the LeaseStore behind the TopologyService."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._entries: dict[str, _Entry] = {}
        self._revision = 0
        self._feed = SnapshotFeed(TopologySnapshot(revision=0, backend="embedded", connected=True))
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._ticker = self._ticker or asyncio.create_task(self._tick(), name="topology-expiry")

    async def register(self, record: WorkerRecord, ttl_s: float) -> Registration:
        return await open_registration(self, record, ttl_s)

    def snapshot(self) -> TopologySnapshot:
        return self._feed.current

    def changes(self) -> AsyncIterator[TopologySnapshot]:
        return self._feed.changes()

    async def close(self) -> None:
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.cancel()
            with suppress(asyncio.CancelledError):
                await ticker
        self._feed.close()

    # ---- leases ----

    async def grant(self, record: WorkerRecord, ttl_s: float) -> str:
        self.expire()
        held = self._entries.get(record.worker_id)
        if held and held.record.incarnation != record.incarnation:
            raise WorkerIdTaken(
                f"worker id {record.worker_id!r} is held by another process at {held.record.address}; "
                "give each worker an id of its own, or stop the other one",
                metadata={"worker_id": record.worker_id, "address": held.record.address},
            )
        entry = _Entry(record, secrets.token_hex(8), ttl_s, self._clock.now() + ttl_s)
        if held:
            entry.links = held.links
        self._entries[record.worker_id] = entry
        self._publish()
        return entry.lease_id

    async def keep_alive(self, lease_id: str, record: WorkerRecord | None = None) -> None:
        self.expire()
        entry = self._entry(lease_id)
        if entry is None:
            raise LeaseExpired(f"lease {lease_id} is unknown or expired; register again")
        entry.expires_at = self._clock.now() + entry.ttl_s
        if record is not None:
            if (record.worker_id, record.incarnation) != (entry.record.worker_id, entry.record.incarnation):
                raise LeaseExpired(f"lease {lease_id} belongs to another worker than {record.worker_id!r}")
            entry.record = record
            self._publish()

    async def put_links(self, lease_id: str, links: Sequence[LinkCost]) -> None:
        self.expire()
        entry = self._entry(lease_id)
        if entry is None:
            raise LeaseExpired(f"lease {lease_id} is unknown or expired; register again")
        entry.links |= {link.source_id: link for link in links}
        self._publish()

    async def revoke(self, lease_id: str) -> None:
        entry = self._entry(lease_id)
        if entry is not None:
            del self._entries[entry.record.worker_id]
            self._publish()

    def ttl_s(self, lease_id: str) -> float:
        """Of a live lease; 0 of any other."""
        entry = self._entry(lease_id)
        return entry.ttl_s if entry else 0.0

    def expire(self) -> int:
        """Drops the entries whose lease has ended; returns how many."""
        now = self._clock.now()
        gone = [worker_id for worker_id, entry in self._entries.items() if entry.expires_at <= now]
        for worker_id in gone:
            del self._entries[worker_id]
        if gone:
            self._publish()
        return len(gone)

    def _entry(self, lease_id: str) -> _Entry | None:
        return next((entry for entry in self._entries.values() if entry.lease_id == lease_id), None)

    def _publish(self) -> None:
        workers = tuple(self._entries[worker_id].record for worker_id in sorted(self._entries))
        links = tuple(link for entry in self._entries.values() for _, link in sorted(entry.links.items()))
        if (workers, links) != (self._feed.current.workers, self._feed.current.links):
            self._revision += 1
            self._feed.publish(TopologySnapshot(self._revision, "embedded", True, workers, links))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.expire()
