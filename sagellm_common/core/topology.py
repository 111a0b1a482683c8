"""Who is there: workers by id, each kept by a lease, as a stream of snapshots.

        worker ── register(record, ttl) ──► store ──► changes() ──► router
                  keep alive each ttl/3       │
                  publish_links(costs)        └─ a silent worker is gone after ttl, and the links to it

`EtcdTopology` keeps it in etcd, `EmbeddedTopology` in the router's process, and `rpc.topology_client.RemoteTopology`
reaches the embedded one from the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sagellm_common.core.types import WorkerRecord


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What it costs to move KV from `source_id` to `target_id` over one byte path: latency_s + bytes / bytes_per_s.

    Each message of a transfer costs `per_message_s` on top, 0 where that is not known. `measured_at_s` is Unix time at
    the target, which measures; `samples` are the transfers that it knows this from.
    """

    source_id: str
    target_id: str
    backend: str
    latency_s: float
    bytes_per_s: float
    per_message_s: float = 0.0
    measured_at_s: float = 0.0
    samples: int = 0

    def seconds(self, num_bytes: int) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class TopologySnapshot:
    """The workers at one moment, sorted by id, and the links between them that were measured.

    `revision` grows with each change within one life of the backend. `connected` is False while the backend is
    away and this is the last thing known of it.
    """

    revision: int
    backend: str
    connected: bool
    workers: tuple[WorkerRecord, ...] = ()
    links: tuple[LinkCost, ...] = ()

    def find(self, worker_id: str) -> WorkerRecord | None:
        return next((record for record in self.workers if record.worker_id == worker_id), None)


class Registration(Protocol):
    """One worker's entry, kept alive until `close`; renewed by itself after an outage of the store."""

    @property
    def lost(self) -> asyncio.Event:
        """Set when another incarnation took the worker id: this process must stop working under it."""

    async def update(self, record: WorkerRecord) -> None:
        """Changes the entry (role, state). While the store is away the change waits for its return."""

    async def publish_links(self, links: Sequence[LinkCost]) -> None:
        """Adds links to this worker to its entry, or replaces those from the same source. They go when it goes.

        While the store is away they wait for its return.
        """

    async def close(self) -> None:
        """Removes the entry; if the store is away, the lease's end does. Idempotent."""


class TopologyStore(Protocol):
    async def start(self) -> None:
        """Begins to follow the store. Raises PeerLost when nothing answers within the connect timeout."""

    async def register(self, record: WorkerRecord, ttl_s: float) -> Registration:
        """Enters the worker, under a lease that ends `ttl_s` seconds after it fell silent.

        The entry of an earlier incarnation is waited out, at most 2 x ttl_s. Raises WorkerIdTaken when it is
        still alive then, PeerLost when the store does not answer.
        """

    def snapshot(self) -> TopologySnapshot: ...

    def changes(self) -> AsyncIterator[TopologySnapshot]:
        """The current snapshot, then each later one; a slow reader skips to the latest. Ends with `close`."""

    async def close(self) -> None:
        """Stops following. Registrations are closed by whoever made them. Idempotent."""


class SnapshotFeed:
    """The latest snapshot, for any number of readers at their own pace."""

    def __init__(self, first: TopologySnapshot) -> None:
        self._current = first
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def current(self) -> TopologySnapshot:
        return self._current

    def publish(self, snapshot: TopologySnapshot) -> None:
        """A snapshot equal to the current one is no change."""
        if snapshot != self._current:
            self._current = snapshot
            self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()

    async def changes(self) -> AsyncIterator[TopologySnapshot]:
        while not self._closed:
            # Taken together and before the yield: what is published while the reader works sets this event.
            snapshot, changed = self._current, self._changed
            yield snapshot
            await changed.wait()

    def _wake(self) -> None:
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()
