"""WorkerService: what a worker says of itself - status on demand, status as it changes, drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import grpc

from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.step_costs import StepLog
from sagellm_common.core.types import KvHealth, KvStats, WorkerRecord, WorkerRole
from sagellm_common.kv_policy.migration import MIGRATION
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.rpc import codec
from sagellm_common.rpc.block_journal import BlockChanges, BlockJournal
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.handoffs import encode_record
from sagellm_common.rpc.transport_control import TransportControl

log = logging.getLogger(__name__)

DEFAULT_MIN_INTERVAL_S = 0.2
SHORTEST_MIN_INTERVAL_S = 0.01


@dataclass(frozen=True, slots=True)
class Load:
    """How much a worker has to do right now."""

    running_requests: int = 0
    waiting_requests: int = 0
    reservations: int = 0
    pinned_transfers: int = 0

    @property
    def idle(self) -> bool:
        return not (self.running_requests or self.waiting_requests or self.reservations or self.pinned_transfers)


class WorkerView(Protocol):
    """What WorkerServicer and the services' loops ask of the worker they run in; `WorkerRuntime` implements it."""

    @property
    def record(self) -> WorkerRecord: ...

    def load(self) -> Load: ...

    def kv_stats(self) -> KvStats: ...

    def kv_health(self) -> KvHealth: ...

    def check_accepting(self, work: WorkerRole | None = None) -> None:
        """Raises Draining once no new work is taken, or none of that role."""

    async def drain(self, grace_s: float | None) -> int:
        """Turns new work away, waits for what runs; returns the number of requests left unfinished. Idempotent."""

    async def set_role(self, role: WorkerRole, grace_s: float | None, keep_engine: bool) -> int:
        """Takes work of `role` only; returns how much of the other runs on after the grace. Raises ConfigError,
        WrongRole, Draining."""


class _State(NamedTuple):
    """What a worker's status tells. Taken and compared many times a second beside the engine's thread, which waits for
    the interpreter meanwhile: it is encoded when it has changed."""

    record: WorkerRecord
    kv: KvStats
    kv_health: KvHealth
    load: Load
    transport_changes: tuple[tuple[str, str, str], ...]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """`handoffs` None: this worker keeps no records of them; `step_log` None: it has no engine."""

    def __init__(
        self,
        worker: WorkerView,
        journal: BlockJournal,
        transport: TransportControl,
        pool: KVBackendProtocol,
        handoffs: HandoffLog | None = None,
        step_log: StepLog | None = None,
    ) -> None:
        self._worker = worker
        self._step_log = step_log or StepLog()
        self._journal = journal
        self._transport = transport
        self._pool = pool
        self._handoffs = handoffs
        self._encoded: tuple[WorkerRecord, worker_pb2.WorkerRecord] | None = None
        """The record as it was told last: it seldom changes, and holds the model's whole description."""

    def status(self) -> worker_pb2.WorkerStatus:
        return self._encode(self._state())

    def _state(self) -> _State:
        worker = self._worker
        return _State(
            worker.record, worker.kv_stats(), worker.kv_health(), worker.load(), tuple(self._transport.changes())
        )

    def _encode(self, state: _State) -> worker_pb2.WorkerStatus:
        load = state.load
        return worker_pb2.WorkerStatus(
            record=self._encode_record(state.record),
            kv=codec.encode_kv_stats(state.kv),
            kv_health=codec.encode_kv_health(state.kv_health),
            running_requests=load.running_requests,
            waiting_requests=load.waiting_requests,
            reservations=load.reservations,
            pinned_transfers=load.pinned_transfers,
            transport_changes=_encode_changes(state.transport_changes),
        )

    def _encode_record(self, record: WorkerRecord) -> worker_pb2.WorkerRecord:
        if self._encoded is None or self._encoded[0] is not record:
            self._encoded = record, codec.encode_worker_record(record)
        return self._encoded[1]

    async def GetStatus(
        self,
        request: worker_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GetStatusRequest, worker_pb2.WorkerStatus],
    ) -> worker_pb2.WorkerStatus:
        return self.status()

    async def WatchStatus(
        self,
        request: worker_pb2.WatchStatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WatchStatusRequest, worker_pb2.WorkerStatus],
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        """Lives as long as the caller wants it: the one kind of call without a deadline."""
        interval_s = max(request.min_interval_ms / 1000 or DEFAULT_MIN_INTERVAL_S, SHORTEST_MIN_INTERVAL_S)
        longest_s = max(request.max_interval_ms / 1000, interval_s) if request.max_interval_ms else float("inf")
        loop = asyncio.get_running_loop()
        seen = request.from_revision if request.incarnation == self._worker.record.incarnation else 0
        told, told_s, step = None, loop.time(), self._step_log.last
        while True:
            now, parts = self._state(), self._journal.after(seen)
            changes = next(parts, None)
            due = now != told or step != self._step_log.last or loop.time() - told_s >= longest_s
            if changes is None and due:
                changes = BlockChanges(seen, seen)
            while changes is not None:
                message = self._encode(now)
                message.block_events.CopyFrom(_events(changes))
                step, costs = self._step_log.after(step)
                message.steps.extend(map(codec.encode_step_cost, costs))
                yield message
                told, told_s, seen = now, loop.time(), changes.revision
                changes = next(parts, None)
            await asyncio.sleep(interval_s)

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        grace_s = request.grace_ms / 1000 if request.grace_ms > 0 else None
        return worker_pb2.DrainResponse(unfinished_requests=await self._worker.drain(grace_s))

    async def SetRole(
        self,
        request: worker_pb2.SetRoleRequest,
        context: grpc.aio.ServicerContext[worker_pb2.SetRoleRequest, worker_pb2.SetRoleResponse],
    ) -> worker_pb2.SetRoleResponse:
        before, grace_s = self._worker.record.role, request.grace_ms / 1000 if request.grace_ms > 0 else None
        role = codec.decode_worker_role(request.role)
        unfinished = await self._worker.set_role(role, grace_s, request.keep_engine)
        return worker_pb2.SetRoleResponse(
            record=self._encode_record(self._worker.record),
            before=codec.encode_worker_role(before),
            unfinished_requests=unfinished,
        )

    async def ListHandoffs(
        self,
        request: worker_pb2.ListHandoffsRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ListHandoffsRequest, worker_pb2.ListHandoffsResponse],
    ) -> worker_pb2.ListHandoffsResponse:
        if request.last < 0:
            raise InvalidRequest(f"last is {request.last}, but must be at least 0 (0: all that are kept)")
        me, kept = self._worker.record, self._handoffs
        found = kept.records(request.request_id, request.last, request.failed) if kept is not None else []
        return worker_pb2.ListHandoffsResponse(
            worker_id=me.worker_id, incarnation=me.incarnation, records=map(encode_record, found)
        )

    async def ProbeLinks(
        self,
        request: worker_pb2.ProbeWorkerLinksRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ProbeWorkerLinksRequest, worker_pb2.ProbeWorkerLinksResponse],
    ) -> worker_pb2.ProbeWorkerLinksResponse:
        sources = [codec.decode_worker_record(record, "sources") for record in request.sources]
        links, failures = await self._transport.probe(self._worker.record, sources, request.max_bytes)
        return worker_pb2.ProbeWorkerLinksResponse(links=map(codec.encode_link, links), failures=failures)

    async def SetTransport(
        self,
        request: worker_pb2.SetWorkerTransportRequest,
        context: grpc.aio.ServicerContext[worker_pb2.SetWorkerTransportRequest, worker_pb2.SetWorkerTransportResponse],
    ) -> worker_pb2.SetWorkerTransportResponse:
        self._transport.set(request.settings)
        return worker_pb2.SetWorkerTransportResponse(
            in_force=self._transport.settings, changes=_encode_changes(self._transport.changes())
        )

    async def SetEviction(
        self,
        request: worker_pb2.SetWorkerEvictionRequest,
        context: grpc.aio.ServicerContext[worker_pb2.SetWorkerEvictionRequest, worker_pb2.SetWorkerEvictionResponse],
    ) -> worker_pb2.SetWorkerEvictionResponse:
        pool, before = self._pool, self._pool.eviction
        if request.migration:
            MIGRATION.get(request.migration)  # before anything is changed
        if request.policy:
            await asyncio.to_thread(pool.set_eviction, request.policy)  # its blocks may be many
            log.info("blocks are evicted by %s from now on, were by %s", pool.eviction, before)
        tiers = pool if isinstance(pool, HierarchyManager) else None
        if request.migration and tiers is not None and tiers.migration:
            before = tiers.migration
            tiers.set_migration(request.migration)
            log.info("blocks go to lower tiers and come up by %s from now on, were by %s", tiers.migration, before)
        return worker_pb2.SetWorkerEvictionResponse(
            policy=pool.eviction,
            cached_blocks=self._worker.kv_stats().cached_blocks,
            migration=tiers.migration if tiers is not None else "",
        )


def _encode_changes(changes: Iterable[tuple[str, str, str]]) -> list[worker_pb2.TransportChange]:
    return [worker_pb2.TransportChange(key=key, loaded=loaded, now=now) for key, loaded, now in changes]


def _events(changes: BlockChanges) -> worker_pb2.BlockEvents:
    return worker_pb2.BlockEvents(
        revision=changes.revision,
        since_revision=changes.since,
        snapshot=changes.snapshot,
        more=changes.more,
        tier=codec.encode_tier(changes.tier),
        stored_hashes=changes.stored,
        removed_hashes=changes.removed,
        age_ms=changes.age_s * 1e3,
    )
