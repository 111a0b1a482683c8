"""When a failed attempt is tried again, where, and after how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sagellm_common.core.errors import (
    Cancelled,
    Draining,
    KvCorrupt,
    LeaseExpired,
    NoWorker,
    Overloaded,
    PeerLost,
    SageError,
    TenantQuota,
)
from sagellm_common.core.types import WorkerRole
from services.router.workers import WorkerKey, WorkerLink

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 0.25


@dataclass(slots=True)
class Retry:
    """One request's failures so far.

    Failed attempts are bounded by `max_attempts`. A full worker is no failure: the request waits for room until its
    deadline, asking the others in between; but a tenant that is at its limit everywhere is told so. Nor is one that
    leaves, of which the router had not heard yet. `avoid` are workers that failed it or leave, `full` those without
    room in this round.
    """

    max_attempts: int
    failures: int = 0
    rejections: int = 0
    avoid: set[WorkerKey] = field(default_factory=set)
    full: set[WorkerKey] = field(default_factory=set)

    def delay_after(self, error: SageError, at_fault: WorkerLink | None) -> float:
        """Seconds to wait before the next attempt. Raises `error` when there is none."""
        leaves = isinstance(error, Draining)
        if isinstance(error, Cancelled):
            # Not by the client, that is handled before: the worker stops, and the request goes elsewhere.
            error = Draining(f"a worker cancelled the request: {error.message}")
        if not error.retryable or isinstance(error, NoWorker):  # for a worker it has waited already
            raise error
        if isinstance(error, Overloaded):
            self.rejections += 1
            if isinstance(error, TenantQuota) and (at_fault is None or at_fault.key in self.full):
                raise error  # its peers were asked, too, and a tenant's requests must not fill the queue of all
            if at_fault is not None:
                # Full for the second time: all its peers were asked in between, and a new round begins.
                self.full = {at_fault.key} if at_fault.key in self.full else self.full | {at_fault.key}
            return _backoff(self.rejections)
        if leaves and at_fault is not None and at_fault.key not in self.avoid:
            self.rejections += 1
            self.avoid.add(at_fault.key)
            return _backoff(self.rejections)
        self.failures += 1
        if self.failures >= self.max_attempts:
            raise error
        if at_fault is not None:
            self.avoid.add(at_fault.key)
        return _backoff(self.failures)

    def preferred(self, links: Sequence[WorkerLink]) -> list[WorkerLink]:
        """Without the avoided ones, nor the full ones that have a peer with room.

        If avoiding leaves no decode worker, they get another chance; prefill workers do not, for a decode worker can
        stand in for them.
        """
        if not self.avoid and not self.full:
            return list(links)
        others = [link for link in links if link.key not in self.avoid]
        if not any(_decodes(link) for link in others):
            others = [link for link in links if link in others or _decodes(link)]
        with_room = {link.record.role for link in others if link.key not in self.full}
        return [link for link in others if link.key not in self.full or with_room.isdisjoint(_peers(link))]


def blames_source(error: SageError, decode: WorkerLink) -> bool:
    """Whether a decode worker's error before its first token is about the worker it was to pull from.

    A lost session names the decode worker itself; other losses happened while it pulled.
    """
    own_session = error.metadata.get("worker_id") == decode.worker_id
    return isinstance(error, PeerLost | LeaseExpired | KvCorrupt) and not own_session


def _decodes(link: WorkerLink) -> bool:
    return link.record.role in (WorkerRole.DECODE, WorkerRole.BOTH)


def _peers(link: WorkerLink) -> set[WorkerRole]:
    """Roles that can stand in for it."""
    return {link.record.role, WorkerRole.BOTH}


def _backoff(times: int) -> float:
    return float(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (times - 1)))
