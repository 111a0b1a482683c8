"""One worker's entry in the topology, kept alive: the same loop over every store.

grant ──► keep alive each ttl/3 ──► LeaseExpired: grant again
                │                       └─ WorkerIdTaken: lost, for good
                └─ store away: keep trying
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from sagellm_common.core.errors import DeadlineExceeded, LeaseExpired, SageError, Unreachable, WorkerIdTaken
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import WorkerRecord

log = logging.getLogger(__name__)

RETRY_S = 0.1
"""Pause before trying again, when refused or unreachable."""


class LeaseStore(Protocol):
    """What a store must be able to do for a lease. Each call answers or fails within a bounded time.

    All raise Unreachable or DeadlineExceeded while the store is away.
    """

    async def grant(self, record: WorkerRecord, ttl_s: float) -> str:
        """Enters the record under a new lease. Again for the same incarnation, it replaces its lease.

        Raises WorkerIdTaken while another incarnation's lease lives.
        """

    async def keep_alive(self, lease_id: str, record: WorkerRecord) -> None:
        """Renews the lease; the entry is `record` afterwards. Raises LeaseExpired, WorkerIdTaken."""

    async def put_links(self, lease_id: str, links: Sequence[LinkCost]) -> None:
        """Keeps links to the worker as long as its lease. Raises LeaseExpired."""

    async def revoke(self, lease_id: str) -> None:
        """Removes the entry. An unknown lease is fine."""


class LeasedRegistration:
    """A `Registration` over a LeaseStore. Made by `open_registration`."""

    def __init__(self, store: LeaseStore, record: WorkerRecord, ttl_s: float, lease_id: str) -> None:
        self._store = store
        self._record = record
        self._ttl_s = ttl_s
        self._lease_id = lease_id
        self._links: dict[str, LinkCost] = {}
        """By source; all that were published."""
        self._unwritten: set[str] = set()
        """Sources whose link the store does not have yet under this lease."""
        self._failing = False
        self._lost = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._run(), name=f"lease:{record.worker_id}")

    @property
    def lost(self) -> asyncio.Event:
        return self._lost

    async def update(self, record: WorkerRecord) -> None:
        self._record = record
        await self._renew()

    async def publish_links(self, links: Sequence[LinkCost]) -> None:
        self._links |= {link.source_id: link for link in links}
        self._unwritten |= {link.source_id for link in links}
        await self._renew()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if not self._lost.is_set():
            try:
                await self._store.revoke(self._lease_id)
            except (Unreachable, DeadlineExceeded) as err:
                log.info("worker %s leaves when its lease ends: %s", self._record.worker_id, err)

    async def _run(self) -> None:
        pause_s = self._ttl_s / 3
        while not self._lost.is_set():
            await asyncio.sleep(pause_s)
            # After a failure sooner than ttl/3: a lease that can still be saved should be.
            pause_s = self._ttl_s / 3 if await self._renew() else min(RETRY_S, self._ttl_s / 3)

    async def _renew(self) -> bool:
        """One keepalive, or a new lease when the old one is gone. False when the store did not take it."""
        async with self._one_at_a_time:
            if self._lost.is_set():
                return False
            record = self._record
            try:
                try:
                    await self._store.keep_alive(self._lease_id, record)
                except LeaseExpired:
                    self._lease_id = await self._store.grant(record, self._ttl_s)
                    self._unwritten = set(self._links)
                    log.info("worker %s registered again", record.worker_id)
                if self._unwritten:
                    writing = [self._links[source_id] for source_id in sorted(self._unwritten)]
                    await self._store.put_links(self._lease_id, writing)
                    self._unwritten -= {link.source_id for link in writing if self._links[link.source_id] is link}
            except WorkerIdTaken as err:
                log.error("worker %s lost its id to another process: %s", record.worker_id, err)
                self._lost.set()
                return False
            except SageError as err:
                if not self._failing:
                    log.warning("worker %s cannot renew its lease, trying on: %s", record.worker_id, err)
                self._failing = True
                return False
            self._failing = False
            return True


async def open_registration(
    store: LeaseStore, record: WorkerRecord, ttl_s: float, *, connect_timeout_s: float = 10.0
) -> LeasedRegistration:
    """Registers and keeps alive.

    A restarted worker finds its id held by its earlier incarnation until that lease ends, hence the patience of
    2 x ttl_s with WorkerIdTaken. Raises it after that, and PeerLost when the store stays away for
    `connect_timeout_s`.
    """
    now = asyncio.get_running_loop().time
    begin = now()
    while True:
        try:
            return LeasedRegistration(store, record, ttl_s, await store.grant(record, ttl_s))
        except WorkerIdTaken:
            if now() - begin >= 2 * ttl_s:
                raise
        except (Unreachable, DeadlineExceeded):
            if now() - begin >= connect_timeout_s:
                raise
        await asyncio.sleep(RETRY_S)
