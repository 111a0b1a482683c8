"""WorkerService from outside: what a worker says of its load, its KV and its prefix cache."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field

import grpc

from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.types import KvHealth, KvStats, WorkerRecord
from sagellm_common.rpc import codec
from sagellm_common.rpc.block_journal import BlockChanges
from sagellm_common.rpc.channels import call, stream
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.transport_control import PROBE_TIMEOUT_S

SET_TIMEOUT_S = 2.0
PROBE_MARGIN_S = 2.0
GRACE_MARGIN_S = 5.0
LONGEST_GRACE_S = 3600.0
"""That is waited for without being named."""


@dataclass(frozen=True, slots=True)
class IndexedBlocks:
    """What a router's prefix index knows of a worker.

    `staleness_ms` has passed since the worker's last word; `lag_ms` old were the events of its last changes when it
    told them. `credited`: requests are placed by these blocks.
    """

    revision: int
    blocks: int
    staleness_ms: float
    lag_ms: float
    credited: bool


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    record: WorkerRecord
    kv: KvStats
    running_requests: int = 0
    waiting_requests: int = 0
    reservations: int = 0
    pinned_transfers: int = 0
    session: str = ""
    """What carries the router's session with it: framed, grpc, or nothing while none is open. Only the router knows."""
    transport_changes: tuple[tuple[str, str, str], ...] = ()
    """(key, loaded, now) of transport settings that are no longer as they were loaded."""
    indexed: IndexedBlocks | None = None
    """Only the router knows."""
    kv_health: KvHealth = field(default_factory=KvHealth)
    steps: tuple[StepCost, ...] = ()
    """Of its engine since the last message, the newest of them. Only `watch_status` tells."""


async def get_status(channel: grpc.aio.Channel, *, timeout_s: float) -> WorkerStatus:
    """Raises PeerLost, DeadlineExceeded."""
    method = worker_pb2_grpc.WorkerServiceStub(channel).GetStatus
    return decode_status(
        await call(method, worker_pb2.GetStatusRequest(), timeout_s=timeout_s, response=worker_pb2.WorkerStatus)
    )


async def probe_links(
    channel: grpc.aio.Channel, sources: Sequence[WorkerRecord], max_bytes: int
) -> worker_pb2.ProbeWorkerLinksResponse:
    """Has the worker measure the links from `sources`. Raises InvalidRequest, PeerLost, DeadlineExceeded."""
    request = worker_pb2.ProbeWorkerLinksRequest(sources=map(codec.encode_worker_record, sources), max_bytes=max_bytes)
    return await call(
        worker_pb2_grpc.WorkerServiceStub(channel).ProbeLinks,
        request,
        timeout_s=PROBE_MARGIN_S + PROBE_TIMEOUT_S * len(sources),
        response=worker_pb2.ProbeWorkerLinksResponse,
    )


async def set_transport(
    channel: grpc.aio.Channel, settings: Mapping[str, str]
) -> worker_pb2.SetWorkerTransportResponse:
    """Raises ConfigError, having changed nothing; PeerLost, DeadlineExceeded."""
    return await call(
        worker_pb2_grpc.WorkerServiceStub(channel).SetTransport,
        worker_pb2.SetWorkerTransportRequest(settings=settings),
        timeout_s=SET_TIMEOUT_S,
        response=worker_pb2.SetWorkerTransportResponse,
    )


async def set_eviction(
    channel: grpc.aio.Channel, policy: str, migration: str = ""
) -> worker_pb2.SetWorkerEvictionResponse:
    """Raises ConfigError, having changed nothing; PeerLost, DeadlineExceeded."""
    return await call(
        worker_pb2_grpc.WorkerServiceStub(channel).SetEviction,
        worker_pb2.SetWorkerEvictionRequest(policy=policy, migration=migration),
        timeout_s=SET_TIMEOUT_S,
        response=worker_pb2.SetWorkerEvictionResponse,
    )


async def set_role(channel: grpc.aio.Channel, change: worker_pb2.SetRoleRequest) -> worker_pb2.SetRoleResponse:
    """Answers once the old role's work is done or its grace over. Raises ConfigError, WrongRole and Draining, having
    changed nothing; PeerLost, DeadlineExceeded."""
    method = worker_pb2_grpc.WorkerServiceStub(channel).SetRole
    return await call(method, change, timeout_s=grace_timeout_s(change.grace_ms), response=worker_pb2.SetRoleResponse)


async def drain(channel: grpc.aio.Channel, grace_ms: int) -> worker_pb2.DrainResponse:
    """Answers once nothing runs there, or the grace is over. Raises PeerLost, DeadlineExceeded."""
    method, request = worker_pb2_grpc.WorkerServiceStub(channel).Drain, worker_pb2.DrainRequest(grace_ms=grace_ms)
    return await call(method, request, timeout_s=grace_timeout_s(grace_ms), response=worker_pb2.DrainResponse)


def grace_timeout_s(grace_ms: int) -> float:
    """For a call that waits for a grace; 0: the worker's own, which the caller does not know."""
    return GRACE_MARGIN_S + (grace_ms / 1e3 if grace_ms > 0 else LONGEST_GRACE_S)


async def watch_status(
    channel: grpc.aio.Channel,
    *,
    min_interval_s: float,
    max_interval_s: float = 0.0,
    from_revision: int = 0,
    incarnation: str = "",
) -> AsyncGenerator[tuple[WorkerStatus, BlockChanges], None]:
    """The full state, then each change, and something every `max_interval_s` (0: changes only).

    Block events begin after `from_revision` of that incarnation, where the worker still knows them, else with a
    snapshot. Iterate under `aclosing`. Raises PeerLost when the worker goes away.
    """
    request = worker_pb2.WatchStatusRequest(
        min_interval_ms=int(min_interval_s * 1000),
        max_interval_ms=int(max_interval_s * 1000),
        from_revision=from_revision,
        incarnation=incarnation,
    )
    method = worker_pb2_grpc.WorkerServiceStub(channel).WatchStatus
    updates = stream(method, request, timeout_s=None, response=worker_pb2.WorkerStatus)
    known, record = worker_pb2.WorkerRecord(), None
    async with aclosing(updates):
        async for message in updates:
            if record is None or message.record != known:  # it seldom changes, and holds the model's whole description
                known, record = message.record, codec.decode_worker_record(message.record)
            yield decode_status(message, record), _decode_changes(message.block_events)


def decode_status(message: worker_pb2.WorkerStatus, record: WorkerRecord | None = None) -> WorkerStatus:
    """`record` spares decoding it once more."""
    return WorkerStatus(
        record=record or codec.decode_worker_record(message.record),
        kv=codec.decode_kv_stats(message.kv),
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        reservations=message.reservations,
        pinned_transfers=message.pinned_transfers,
        session=message.session,
        transport_changes=tuple((c.key, c.loaded, c.now) for c in message.transport_changes),
        indexed=decode_indexed(message.indexed) if message.HasField("indexed") else None,
        kv_health=codec.decode_kv_health(message.kv_health),
        steps=tuple(map(codec.decode_step_cost, message.steps)),
    )


def decode_indexed(message: worker_pb2.IndexedBlocks) -> IndexedBlocks:
    return IndexedBlocks(
        message.revision, message.blocks, message.staleness_ms, message.lag_ms, credited=message.credited
    )


def encode_status(status: WorkerStatus) -> worker_pb2.WorkerStatus:
    """Without block events."""
    indexed = status.indexed
    return worker_pb2.WorkerStatus(
        indexed=worker_pb2.IndexedBlocks(**asdict(indexed)) if indexed else None,
        record=codec.encode_worker_record(status.record),
        kv=codec.encode_kv_stats(status.kv),
        kv_health=codec.encode_kv_health(status.kv_health),
        running_requests=status.running_requests,
        waiting_requests=status.waiting_requests,
        reservations=status.reservations,
        pinned_transfers=status.pinned_transfers,
        session=status.session,
        transport_changes=[worker_pb2.TransportChange(key=k, loaded=a, now=b) for k, a, b in status.transport_changes],
    )


def _decode_changes(events: worker_pb2.BlockEvents) -> BlockChanges:
    return BlockChanges(
        revision=events.revision,
        since=events.since_revision,
        snapshot=events.snapshot,
        more=events.more,
        tier=codec.decode_tier(events.tier, "block_events.tier"),
        stored=codec.check_hashes(events.stored_hashes, "block_events.stored_hashes"),
        removed=codec.check_hashes(events.removed_hashes, "block_events.removed_hashes"),
        age_s=events.age_ms / 1e3,
    )
