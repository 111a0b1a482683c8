"""The life of a worker process: what it needs to start, when it stops, and what it says meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, Draining, EngineFailed, WorkerIdTaken, WrongRole
from sagellm_common.core.kv import Allocation
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole, WorkerState, as_token_ids
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.topology_client import RemoteTopology
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from sagellm_common.rpc.worker_service import Load
from tests.support.simulated_engine import SimulatedEngine
from tests.support.topology import make_record
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import test_config


class Harness:
    """A worker without a service: everything the runtime itself does."""

    def __init__(
        self, router: str, config: Config | None = None, *, port: int = 0, metrics_port: int | None = None
    ) -> None:
        config = config or test_config("transport.lease_ttl_s=0.2")
        self.clock = ManualClock()
        self.engine = SimulatedEngine()
        self.current = Load()
        self.failure: Exception | None = None
        self.in_flight = {WorkerRole.PREFILL: 0, WorkerRole.DECODE: 0}
        self.leases = HandoffSource(30.0, self.clock, self.engine.kv.free)
        self.reservations = HandoffTarget(30.0, self.clock, self.engine.kv.free)
        self.topology = RemoteTopology(router, connect_timeout_s=0.2)
        self.registry = CollectorRegistry()
        self.runtime = WorkerRuntime(
            config,
            WorkerRole.DECODE,
            "decode-0",
            pool=self.engine.kv,
            source=self.leases,
            target=self.reservations,
            channel=make_channel(config.transport, self.engine.kv.regions(), self.leases, "127.0.0.1", 0),
            topology=self.topology,
            model=self.engine.model,
            port=port,
            metrics_port=metrics_port,
            metrics=self.registry,
        )

    def load(self) -> Load:
        if self.failure is not None:
            raise self.failure
        return self.current

    def pin(self) -> Allocation:
        allocation = self.engine.kv.allocate(as_token_ids(range(8)), 8)
        return self.leases.pin("t1", 1, allocation, 8)

    def counts(self, *roles: WorkerRole) -> dict[WorkerRole, Callable[[], int]]:
        return {role: partial(self.in_flight.__getitem__, role) for role in roles}

    @contextlib.asynccontextmanager
    async def started(self, *roles: WorkerRole) -> AsyncIterator[WorkerRuntime]:
        """`roles` are those that its process has the parts of."""
        try:
            await self.runtime.start([], self.load, self.counts(*roles))
            yield self.runtime
        finally:
            await self.runtime.close()


@pytest.fixture
def topology() -> EmbeddedTopology:
    return EmbeddedTopology()


@pytest.fixture
async def router(topology: EmbeddedTopology) -> AsyncIterator[str]:
    async with topology_server(topology) as address:
        yield address


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    async with ChannelPool() as pool:
        yield pool


async def health(channels: ChannelPool, address: str) -> int:
    stub = health_pb2_grpc.HealthStub(channels.get(address))
    answer = await call(stub.Check, health_pb2.HealthCheckRequest(service="sagellm.v1.WorkerService"), timeout_s=5.0)
    return answer.status


async def test_it_is_in_the_topology_while_it_runs(router: str, topology: EmbeddedTopology) -> None:
    harness = Harness(router)
    async with harness.started() as runtime:
        record = topology.snapshot().find("decode-0")
        assert record == runtime.record
        assert record.pid == os.getpid()
        assert record.model == harness.engine.model
        assert len(record.incarnation) == 16
        assert set(runtime.ready_line()) == {"ready", "address", "data_address", "metrics_address", "pid", "id"}
    assert topology.snapshot().workers == ()
    assert Harness(router).runtime.record.incarnation != record.incarnation


async def test_a_worker_of_the_same_id_waits_then_is_refused(router: str, topology: EmbeddedTopology) -> None:
    holder = await topology.register(make_record("decode-0", "another"), 1.0)
    try:
        harness = Harness(router, test_config("topology.lease_ttl_s=0.1"))
        with pytest.raises(WorkerIdTaken, match="decode-0"):
            async with harness.started():
                raise AssertionError("must not have started")
    finally:
        await holder.close()


async def test_a_restarted_worker_waits_out_its_past_life(router: str, topology: EmbeddedTopology) -> None:
    await topology.grant(make_record("decode-0", "of-a-past-life"), 0.3)
    async with Harness(router).started() as runtime:
        record = topology.snapshot().find("decode-0")
        assert record is not None
        assert record.incarnation == runtime.record.incarnation


async def test_it_starts_before_the_router_does() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    harness = Harness(address)
    starting = asyncio.create_task(harness.runtime.start([], harness.load))
    topology = EmbeddedTopology()
    try:
        # Long enough for a first try to fail: the next ones must go on.
        done, _ = await asyncio.wait([starting], timeout=0.5)
        assert not done
        async with topology_server(topology, bind=address):
            await asyncio.wait_for(starting, TIMEOUT_S)
            assert topology.snapshot().find("decode-0") is not None
            await harness.runtime.close()
    finally:
        starting.cancel()
        await asyncio.wait([starting])
        await harness.runtime.close()


@pytest.mark.parametrize("which", ["port", "metrics_port"])
async def test_a_port_in_use_is_named(router: str, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        harness = Harness(router, port=port) if which == "port" else Harness(router, metrics_port=port)
        with pytest.raises(ConfigError, match=str(port)):
            async with harness.started():
                raise AssertionError("must not have started")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_then_ends(
    router: str, topology: EmbeddedTopology, channels: ChannelPool, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    harness = Harness(router, metrics_port=0)
    harness.current = Load(running_requests=1)
    running = asyncio.create_task(harness.runtime.run([], harness.load))
    await eventually(lambda: topology.snapshot().find("decode-0") is not None)
    address = harness.runtime.record.address
    await eventually(lambda: bool(harness.runtime.metrics_address))
    async with asyncio.timeout(TIMEOUT_S):
        while await health(channels, address) != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110
            await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    await eventually(lambda: harness.runtime.record.state is WorkerState.DRAINING)
    assert await health(channels, address) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(Draining):
        harness.runtime.check_accepting()
    await eventually(lambda: [w.state for w in topology.snapshot().workers] == [WorkerState.DRAINING])
    assert not running.done(), "it must wait for the running request"
    harness.current = Load()
    await asyncio.wait_for(running, TIMEOUT_S)
    assert topology.snapshot().workers == ()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["address"] == address


async def test_a_second_signal_does_not_wait(router: str, topology: EmbeddedTopology) -> None:
    harness = Harness(router)
    harness.current = Load(running_requests=1)
    running = asyncio.create_task(harness.runtime.run([], harness.load))
    await eventually(lambda: topology.snapshot().find("decode-0") is not None)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: harness.runtime.record.state is WorkerState.DRAINING)
    await asyncio.wait_for(running, TIMEOUT_S)


async def test_drain_counts_what_it_had_to_leave(router: str, topology: EmbeddedTopology) -> None:
    harness = Harness(router)
    harness.current = Load(running_requests=2, waiting_requests=1)
    running = asyncio.create_task(harness.runtime.run([], harness.load))
    await eventually(lambda: topology.snapshot().find("decode-0") is not None)
    async with ChannelPool() as channels:
        stub = worker_pb2_grpc.WorkerServiceStub(channels.get(harness.runtime.record.address))
        answer = await call(stub.Drain, worker_pb2.DrainRequest(grace_ms=30), timeout_s=TIMEOUT_S)
    assert answer.unfinished_requests == 3
    await asyncio.wait_for(running, TIMEOUT_S)


async def test_a_drain_waits_for_promises_and_pins(router: str) -> None:
    harness = Harness(router)
    async with harness.started() as runtime:
        for load in (Load(reservations=1), Load(pinned_transfers=1), Load(waiting_requests=1)):
            assert not load.idle
        harness.current = Load(pinned_transfers=1)
        draining = asyncio.create_task(runtime.drain(TIMEOUT_S))
        await eventually(lambda: runtime.record.state is WorkerState.DRAINING)
        assert not draining.done()
        harness.current = Load()
        assert await draining == 0


PARTS = (WorkerRole.PREFILL, WorkerRole.DECODE)


async def test_a_role_is_told_at_once_and_waits_for_what_runs_of_the_old_one(
    router: str, topology: EmbeddedTopology, channels: ChannelPool
) -> None:
    harness = Harness(router)
    async with harness.started(*PARTS) as runtime:
        before = runtime.record
        harness.in_flight[WorkerRole.DECODE] = 1
        stub = worker_pb2_grpc.WorkerServiceStub(channels.get(before.address))
        request = worker_pb2.SetRoleRequest(role=common_pb2.WORKER_ROLE_PREFILL, grace_ms=int(TIMEOUT_S * 1e3))
        changing = asyncio.create_task(call(stub.SetRole, request, timeout_s=TIMEOUT_S))
        await eventually(lambda: [w.role for w in topology.snapshot().workers] == [WorkerRole.PREFILL])
        assert not changing.done()
        runtime.check_accepting(WorkerRole.PREFILL)
        with pytest.raises(Draining, match="takes no new decode work"):
            runtime.check_accepting(WorkerRole.DECODE)
        harness.in_flight[WorkerRole.DECODE] = 0
        answer = await changing
        assert (answer.before, answer.unfinished_requests) == (common_pb2.WORKER_ROLE_DECODE, 0)
        assert runtime.record == replace(before, role=WorkerRole.PREFILL), "the incarnation stays, and all KV with it"
        harness.in_flight[WorkerRole.PREFILL] = 3
        assert await runtime.set_role(WorkerRole.BOTH, 0.0) == 0, "nothing of the old role has to end"
        assert await runtime.set_role(WorkerRole.DECODE, 0.0) == 3
        assert await runtime.set_role(WorkerRole.DECODE, TIMEOUT_S) == 0, "it has that role already"


async def test_reservations_are_work_of_decode(router: str) -> None:
    harness = Harness(router)
    async with harness.started(*PARTS) as runtime:
        harness.reservations.reserve("r", 1, harness.engine.kv.allocate(as_token_ids(range(8)), 8))
        assert await runtime.set_role(WorkerRole.PREFILL, 0.0) == 1
        harness.reservations.release("r", 1)


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.BOTH, WorkerRole.KV_STORE])
async def test_a_process_without_the_part_cannot_take_the_role(router: str, role: WorkerRole) -> None:
    async with Harness(router).started(WorkerRole.DECODE) as runtime:
        with pytest.raises(
            WrongRole, match=rf"cannot take the role {role}: its process serves decode; .*services\.worker"
        ):
            await runtime.set_role(role)
        assert runtime.record.role is WorkerRole.DECODE


async def test_what_an_engine_cannot_change_under_way_is_named(router: str) -> None:
    settings = "engine.num_blocks=64", "prefill.num_blocks=256", "prefill.max_batch_size=2", "prefill.eviction=lru"
    harness = Harness(router, test_config(*settings))
    async with harness.started(*PARTS) as runtime:
        named = (
            r"num_blocks \(now 64, prefill has 256\), max_batch_size \(now 16, prefill has 2\); restart it as prefill"
        )
        with pytest.raises(ConfigError, match=named) as refused:
            await runtime.set_role(WorkerRole.PREFILL)
        assert "eviction" not in refused.value.message
        assert runtime.record.role is WorkerRole.DECODE
        assert await runtime.set_role(WorkerRole.PREFILL, keep_engine=True) == 0
        assert await runtime.set_role(WorkerRole.BOTH) == 0, "its engine is as `engine` says"


async def test_the_eviction_policy_changes_with_the_role(router: str) -> None:
    harness = Harness(router, test_config("prefill.eviction=lru", "decode.eviction=arc"))
    async with harness.started(*PARTS) as runtime:
        await runtime.set_role(WorkerRole.PREFILL)
        assert harness.engine.kv.eviction == "lru"


async def test_a_draining_worker_takes_no_other_role(router: str) -> None:
    async with Harness(router).started(*PARTS) as runtime:
        await runtime.drain(0.0)
        with pytest.raises(Draining):
            await runtime.set_role(WorkerRole.PREFILL)


async def test_the_grace_of_the_configuration_is_that_of_a_drain(router: str) -> None:
    harness = Harness(router, test_config("cluster.drain_grace_s=0.01"))
    harness.current = Load(running_requests=1)
    async with harness.started() as runtime:
        assert await runtime.drain() == 1


async def test_a_worker_whose_id_was_taken_stops(router: str, topology: EmbeddedTopology) -> None:
    """As after an outage longer than its lease: another one has registered, this one must not go on."""
    harness = Harness(router, test_config("topology.lease_ttl_s=0.3"))
    running = asyncio.create_task(harness.runtime.run([], harness.load))
    await eventually(lambda: topology.snapshot().find("decode-0") is not None)
    (entry,) = topology._entries.values()
    await topology.revoke(entry.lease_id)
    await topology.grant(make_record("decode-0", "another"), 60.0)
    with pytest.raises(WorkerIdTaken, match="decode-0"):
        await asyncio.wait_for(running, TIMEOUT_S)
    record = topology.snapshot().find("decode-0")
    assert record is not None
    assert record.incarnation == "another", "the new one's entry must not be removed"


async def test_an_engine_that_stopped_ends_the_worker(router: str, topology: EmbeddedTopology) -> None:
    harness = Harness(router)
    running = asyncio.create_task(harness.runtime.run([], harness.load))
    await eventually(lambda: topology.snapshot().find("decode-0") is not None)
    harness.failure = EngineFailed("the engine stopped")
    with pytest.raises(EngineFailed):
        await asyncio.wait_for(running, TIMEOUT_S)
    assert topology.snapshot().workers == ()


async def test_leases_expire_by_themselves(router: str) -> None:
    harness = Harness(router)
    async with harness.started() as runtime:
        harness.pin()
        harness.clock.advance(31.0)
        await eventually(lambda: harness.engine.kv.get_utilization().used_blocks == 0)
        assert runtime.expired_leases == 1


async def test_closing_frees_what_is_pinned(router: str) -> None:
    harness = Harness(router)
    async with harness.started():
        harness.pin()
    assert harness.engine.kv.get_utilization().used_blocks == 0


async def test_metrics(router: str) -> None:
    harness = Harness(router, metrics_port=0)
    async with harness.started() as runtime:
        harness.pin()
        harness.current = Load(running_requests=3, waiting_requests=2, reservations=4, pinned_transfers=1)
        url = f"http://{runtime.metrics_address}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
    lines = set(text.splitlines())
    assert {
        'sagellm_worker_kv_blocks{state="total"} 64.0',
        'sagellm_worker_kv_blocks{state="free"} 62.0',
        'sagellm_worker_kv_blocks{state="used"} 2.0',
        'sagellm_worker_kv_blocks{state="cached"} 0.0',
        'sagellm_worker_requests{state="running"} 3.0',
        'sagellm_worker_requests{state="waiting"} 2.0',
        "sagellm_worker_reservations 4.0",
        "sagellm_worker_pinned_transfers 1.0",
        "sagellm_worker_expired_leases_total 0.0",
    } <= lines


async def test_unknown_services_are_unimplemented(router: str, channels: ChannelPool) -> None:
    """A Prefill call at a worker of another role."""
    async with Harness(router).started() as runtime:
        stub = worker_pb2_grpc.PrefillServiceStub(channels.get(runtime.record.address))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Prefill(worker_pb2.PrefillRequest(), timeout=5.0)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
