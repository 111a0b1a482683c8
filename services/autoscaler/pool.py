"""Workers that take either role: how many there are in all, and how many of them prefill. An `Orchestrator`.

Roles are assigned here and nowhere else: a worker that comes, or comes back, with the role of its command line gets the
one that is lacking. Who changes is the least busy, as `sagellm worker set-role` does it: no request is lost by that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from sagellm_common.client.router import RoleChange, WorkerView
from sagellm_common.core.errors import ConfigError, SageError, WrongRole
from sagellm_common.core.types import WorkerRole
from services.autoscaler.observe import requests_on, serves
from services.autoscaler.orchestrator import Phase, Workload

log = logging.getLogger(__name__)

GRACE_S = 2.0
"""For what a worker still does of its old role; what is left then goes on, and is only no longer waited for."""


class SetsRoles(Protocol):
    async def set_role(self, worker_id: str, role: WorkerRole, *, grace_s: float | None = None) -> RoleChange: ...


class Sized(Protocol):
    async def replicas(self, phase: Workload) -> int: ...

    async def scale(self, phase: Workload, replicas: int) -> None: ...


class Pool:
    """`size` None: there are as many workers as there are, and `scale` may not be called."""

    flips = True

    def __init__(self, router: SetsRoles, size: Sized | None) -> None:
        self._router = router
        self._size = size
        self.fixed = size is None
        self._workers: tuple[WorkerView, ...] = ()
        self._prefill: int | None = None
        """How many are to prefill; the others decode."""
        self._rigid: set[str] = set()
        """Incarnations that cannot change."""

    def look(self, workers: Sequence[WorkerView]) -> None:
        self._workers = tuple(worker for worker in workers if worker.record.role is not WorkerRole.KV_STORE)
        if self._prefill is None:
            self._prefill = len(self._of(WorkerRole.PREFILL))

    async def replicas(self, phase: Phase) -> int:
        total = await self._total()
        prefill = min(self._prefill or 0, max(0, total - 1))
        return prefill if phase == "prefill" else total - prefill

    async def scale(self, phase: Phase, replicas: int) -> None:
        if self._size is None:
            raise ConfigError("autoscaler.pool_target is fixed: there are no other workers; name a workload instead")
        before = await self.replicas(phase)
        await self._size.scale("pool", await self._total() + replicas - before)
        if phase == "prefill":
            self._prefill = replicas

    def flip(self, count: int) -> None:
        self._prefill = (self._prefill or 0) + count

    async def settle(self) -> str:
        prefill, decode = await self.replicas("prefill"), await self.replicas("decode")
        changes = self._changes(prefill, decode)
        said = await asyncio.gather(*(self._change(worker, role) for worker, role in changes))
        return "; ".join(said)

    def _changes(self, prefill: int, decode: int) -> list[tuple[WorkerView, WorkerRole]]:
        """Who is to take which role. A worker that starts counts as there: it takes what is lacking then."""
        if prefill < 1 or decode < 1:
            return []  # one worker is both
        found = []
        lacking = {
            WorkerRole.PREFILL: prefill - len(self._of(WorkerRole.PREFILL)),
            WorkerRole.DECODE: decode - len(self._of(WorkerRole.DECODE)),
        }
        for worker in self._changeable(WorkerRole.BOTH):
            role = max(lacking, key=lambda role: lacking[role])
            lacking[role] -= 1
            found.append((worker, role))
        for short, spare in ((WorkerRole.PREFILL, WorkerRole.DECODE), (WorkerRole.DECODE, WorkerRole.PREFILL)):
            count = min(lacking[short], -lacking[spare])
            found += [(worker, short) for worker in self._changeable(spare)[: max(0, count)]]
        return found

    async def _change(self, worker: WorkerView, role: WorkerRole) -> str:
        me = worker.record
        try:
            change = await self._router.set_role(me.worker_id, role, grace_s=GRACE_S)
        except (ConfigError, WrongRole) as err:
            log.warning("%s keeps its role: %s", me.worker_id, err.message)
            self._rigid.add(me.incarnation)
            self._prefill = len(self._of(WorkerRole.PREFILL))
            return f"{me.worker_id} cannot become {role}: {err.message}"
        except SageError as err:
            log.warning("%s is not %s yet: %s", me.worker_id, role, err.message)
            return f"{me.worker_id} is not {role} yet: {err.message}"
        left = f", {change.unfinished_requests} requests go on there" if change.unfinished_requests else ""
        return f"{me.worker_id} from {change.before} to {role}{left}"

    async def _total(self) -> int:
        if self._size is not None:
            return await self._size.replicas("pool")
        return sum(len(self._of(role)) for role in (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH))

    def _of(self, role: WorkerRole) -> list[WorkerView]:
        return [worker for worker in self._workers if serves(worker, role)]

    def _changeable(self, role: WorkerRole) -> list[WorkerView]:
        """The least busy first."""
        able = [worker for worker in self._of(role) if worker.record.incarnation not in self._rigid]
        return sorted(able, key=lambda worker: (requests_on(worker), worker.record.worker_id))
