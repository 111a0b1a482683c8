"""A router and two workers of each role in this process, every connection between them through a `FaultProxy`.

The real router, services, leases, gRPC and TCP byte path; only the engines are simulated, so that a wrong byte of KV is
a wrong token. Leases and patience are short.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import pytest
from prometheus_client import CollectorRegistry

from sagellm_common.core.config import Config, RouterConfig
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRecord, WorkerRole
from sagellm_common.rpc.server import GrpcServer
from services.router import workers as router_workers
from services.router.__main__ import Router, serving
from services.router.observed import RouterMetrics
from tests.support.fault_proxy import FaultProxy
from tests.support.router_harness import RouterHarness
from tests.support.simulated_engine import SimulatedEngine
from tests.support.waiting import eventually
from tests.support.workers import Worker, test_config, worker

LEASE_TTL_S = 0.4
SILENCE_S = 0.3
MAX_ATTEMPTS = 5


@dataclass(slots=True)
class Member:
    """A worker and the ways to it: gRPC, its sessions, the byte path, and its own way to the router's topology."""

    worker: Worker
    control: FaultProxy
    sessions: FaultProxy
    data: FaultProxy
    uplink: FaultProxy

    @property
    def proxies(self) -> Sequence[FaultProxy]:
        return self.control, self.sessions, self.data, self.uplink

    @property
    def busy(self) -> bool:
        return not self.worker.load.idle


@dataclass(slots=True)
class FaultLab:
    router: Router
    clients: RouterHarness
    members: dict[WorkerRole, list[Member]]

    @property
    def everybody(self) -> list[Member]:
        return [member for members in self.members.values() for member in members]

    def pick(self, role: WorkerRole, rng: random.Random) -> Member:
        """Of this role, one with something to do if there is one."""
        members = self.members[role]
        return rng.choice([member for member in members if member.busy] or members)

    async def healed(self) -> None:
        """Everybody can be reached again, uses the usual addresses, and holds nothing."""
        for member in self.everybody:
            for proxy in member.proxies:
                proxy.heal()
        for member in self.everybody:
            await member.worker.idle()
        links = self.router.workers
        for member in self.everybody:
            record = member.worker.runtime.record
            await eventually(
                lambda record=record: (
                    (link := links.find(record.worker_id, record.incarnation)) is not None and link.usable
                ),
                lambda record=record: f"the router has not found {record.worker_id} again",
            )
        await eventually(lambda: self.router.pipeline.in_flight == 0)


def forget(lab: FaultLab) -> None:
    """Empties the prefix caches: the next prompts are computed and pulled as a whole."""
    for member in lab.everybody:
        member.worker.engine.kv.forget()


@asynccontextmanager
async def fault_lab(monkeypatch: pytest.MonkeyPatch, *, overlap: bool) -> AsyncIterator[FaultLab]:
    # What still runs on a worker that left the topology is given up sooner than in life.
    monkeypatch.setattr(router_workers, "DEPARTED_GRACE_S", 0.2)
    router = RouterConfig(max_attempts=MAX_ATTEMPTS, worker_grace_s=2.0, resume_grace_s=2.0)
    config = test_config(
        f"transport.lease_ttl_s={LEASE_TTL_S}",
        f"transport.timeout_s={SILENCE_S}",
        f"transport.overlap={'auto' if overlap else 'off'}",
        "transport.overlap_min_bytes=0",
        "topology.lease_ttl_s=0.5",
    )
    async with AsyncExitStack() as stack:
        registry, topology = CollectorRegistry(), EmbeddedTopology()
        metrics = RouterMetrics(registry)
        running = await stack.enter_async_context(serving(Config(router=router), topology, metrics=metrics))
        members: dict[WorkerRole, list[Member]] = {}
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            members[role] = [await _member(stack, running.address, role, n, config) for n in range(2)]
        options = [("grpc.enable_http_proxy", 0)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.address, options=options))
        lab = FaultLab(running, RouterHarness(topology, running, channel, registry), members)
        await lab.healed()
        yield lab


async def _member(stack: AsyncExitStack, router: str, role: WorkerRole, number: int, config: Config) -> Member:
    proxies: dict[str, FaultProxy] = {}

    async def behind(name: str, target: str) -> str:
        proxies[name] = FaultProxy(target)
        stack.push_async_callback(proxies[name].close)
        return await proxies[name].start()

    async def facade(record: WorkerRecord, server: GrpcServer) -> WorkerRecord:
        sessions = server._sessions
        sessions._port = int((await behind("sessions", f"127.0.0.1:{sessions._port}")).rpartition(":")[2])
        return replace(
            record,
            address=await behind("control", record.address),
            data_address=await behind("data", record.data_address),
        )

    engine = SimulatedEngine(num_blocks=256, block_size_tokens=4, context_length_tokens=256, max_prefill_tokens=32)
    uplink = await behind("uplink", router)
    made = await stack.enter_async_context(
        worker(role, uplink, engine=engine, worker_id=f"{role}-{number}", config=config, facade=facade)
    )
    return Member(made, **proxies)
