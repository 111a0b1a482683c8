"""TopologyService as its callers see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from sagellm_common.core.errors import ConfigError, InvalidRequest, LeaseExpired, PeerLost, WorkerIdTaken
from sagellm_common.core.topology import TopologySnapshot
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import KvStats, WorkerRecord
from sagellm_common.rpc import topology_service
from sagellm_common.rpc.channels import ChannelPool, call, stream
from sagellm_common.rpc.codec import decode_kv_stats, decode_worker_record, encode_worker_record
from sagellm_common.rpc.gen.sagellm.v1 import topology_pb2, topology_pb2_grpc
from sagellm_common.rpc.worker_client import WorkerStatus
from tests.support.topology import make_record
from tests.support.topology_server import topology_server

STATS = KvStats(10, 7, 2, 1)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def make_stub(stack: AsyncExitStack, topology: Any, **options: Any) -> Any:
    address = await stack.enter_async_context(topology_server(topology, **options))
    pool = await stack.enter_async_context(ChannelPool())
    return topology_pb2_grpc.TopologyServiceStub(pool.get(address))


def register(record: WorkerRecord, ttl_ms: int = 60_000) -> topology_pb2.RegisterRequest:
    return topology_pb2.RegisterRequest(record=encode_worker_record(record), ttl_ms=ttl_ms)


async def test_get_shows_records_with_their_live_numbers(stack: AsyncExitStack) -> None:
    async def status(record: WorkerRecord) -> WorkerStatus | None:
        if record.worker_id == "silent":
            raise PeerLost("gone")
        return WorkerStatus(record, STATS, running_requests=3) if record.worker_id == "live" else None

    stub = await make_stub(stack, EmbeddedTopology(), status=status)
    for worker_id in ("live", "silent", "young"):
        await call(stub.Register, register(make_record(worker_id)), timeout_s=5)
    answer: Any = await call(stub.Get, topology_pb2.GetTopologyRequest(), timeout_s=5)
    assert (answer.backend, answer.connected, answer.revision) == ("embedded", True, 3)
    assert [decode_worker_record(w.record) for w in answer.workers] == [
        make_record(worker_id) for worker_id in ("live", "silent", "young")
    ]
    assert [decode_kv_stats(w.kv) if w.HasField("kv") else None for w in answer.workers] == [STATS, None, None]
    assert [w.running_requests for w in answer.workers] == [3, 0, 0]


async def test_a_worker_that_hangs_does_not_hold_up_the_others(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def status(record: WorkerRecord) -> WorkerStatus | None:
        if record.worker_id == "hung":
            await asyncio.Event().wait()
        return WorkerStatus(record, STATS)

    monkeypatch.setattr(topology_service, "STATUS_TIMEOUT_S", 0.05)
    stub = await make_stub(stack, EmbeddedTopology(), status=status)
    for worker_id in ("hung", "live"):
        await call(stub.Register, register(make_record(worker_id)), timeout_s=5)
    answer: Any = await call(stub.Get, topology_pb2.GetTopologyRequest(), timeout_s=10)
    assert [w.HasField("kv") for w in answer.workers] == [False, True]


async def test_watch_brings_the_current_state_then_changes(stack: AsyncExitStack) -> None:
    stub = await make_stub(stack, EmbeddedTopology())
    async with aclosing(stream(stub.Watch, topology_pb2.WatchTopologyRequest(), timeout_s=30)) as snapshots:
        first: Any = await anext(snapshots)
        assert len(first.workers) == 0
        answer: Any = await call(stub.Register, register(make_record()), timeout_s=5)
        second: Any = await anext(snapshots)
        assert [w.record.worker_id for w in second.workers] == ["prefill-0"]
        await call(stub.Deregister, topology_pb2.DeregisterRequest(lease_id=answer.lease_id), timeout_s=5)
        third: Any = await anext(snapshots)
        assert len(third.workers) == 0


async def test_leases_over_the_wire(stack: AsyncExitStack) -> None:
    stub = await make_stub(stack, EmbeddedTopology())
    answer: Any = await call(stub.Register, register(make_record()), timeout_s=5)
    keep_alive = topology_pb2.KeepAliveRequest(lease_id=answer.lease_id)
    renewed: Any = await call(stub.KeepAlive, keep_alive, timeout_s=5)
    assert renewed.ttl_ms == 60_000
    with pytest.raises(WorkerIdTaken) as caught:
        await call(stub.Register, register(make_record(incarnation="other")), timeout_s=5)
    assert caught.value.metadata["worker_id"] == "prefill-0"
    deregister = topology_pb2.DeregisterRequest(lease_id=answer.lease_id)
    for _ in range(2):
        await call(stub.Deregister, deregister, timeout_s=5)
    with pytest.raises(LeaseExpired):
        await call(stub.KeepAlive, keep_alive, timeout_s=5)


@pytest.mark.parametrize("ttl_ms", [0, -1, 3_600_001])
async def test_a_ttl_out_of_range_is_refused(stack: AsyncExitStack, ttl_ms: int) -> None:
    stub = await make_stub(stack, EmbeddedTopology())
    with pytest.raises(InvalidRequest, match=f"ttl_ms is {ttl_ms}"):
        await call(stub.Register, register(make_record(), ttl_ms), timeout_s=5)


async def test_a_broken_record_is_refused(stack: AsyncExitStack) -> None:
    stub = await make_stub(stack, EmbeddedTopology())
    request = register(make_record())
    request.record.worker_id = ""
    with pytest.raises(InvalidRequest, match=r"record\.worker_id is empty"):
        await call(stub.Register, request, timeout_s=5)


async def test_explain_is_the_routers(stack: AsyncExitStack) -> None:
    stub = await make_stub(stack, EmbeddedTopology())
    with pytest.raises(InvalidRequest, match="request_id is empty"):
        await call(stub.ExplainPlan, topology_pb2.ExplainPlanRequest(), timeout_s=5)
    with pytest.raises(InvalidRequest, match="no plan of request 'r1'"):
        await call(stub.ExplainPlan, topology_pb2.ExplainPlanRequest(request_id="r1"), timeout_s=5)


class EtcdLike:
    """A store that is not the embedded one, while it is away."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def snapshot(self) -> TopologySnapshot:
        return TopologySnapshot(7, "etcd", False, (make_record(),))


async def test_with_etcd_the_router_takes_no_registrations(stack: AsyncExitStack) -> None:
    stub = await make_stub(stack, EtcdLike())
    requests = [
        (stub.Register, register(make_record())),
        (stub.KeepAlive, topology_pb2.KeepAliveRequest()),
        (stub.Deregister, topology_pb2.DeregisterRequest()),
    ]
    for method, request in requests:
        with pytest.raises(ConfigError, match="this router's topology is etcd"):
            await call(method, request, timeout_s=5)
    answer: Any = await call(stub.Get, topology_pb2.GetTopologyRequest(), timeout_s=5)
    assert (answer.backend, answer.connected, len(answer.workers)) == ("etcd", False, 1)
