"""Prefill and decode workers in process: the real services, gRPC, byte path and leases around any engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.core.clock import Clock, SystemClock
from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.topology import Registration
from sagellm_common.core.types import (
    FinishReason,
    GenerationRequest,
    KvPeer,
    KvSource,
    SamplingParams,
    WorkerRecord,
    WorkerRole,
    as_token_ids,
)
from sagellm_common.engines.base import Engine
from sagellm_common.engines.sequences import Sequences
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.kv_transfer_client import CALL_TIMEOUT_S, KvTransferClient
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.model_worker import ModelWorker, Part, load_of
from sagellm_common.rpc.server import GrpcServer
from sagellm_common.rpc.sessions import DecodeSession, DecodeStep, PrefillOutcome, PrefillSession
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.topology_client import RemoteTopology
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from sagellm_common.rpc.worker_service import Load
from services.decode.ahead import PullsAhead
from services.decode.part import decode_part
from services.prefill.part import prefill_part
from tests.support.simulated_engine import SimulatedEngine
from tests.support.waiting import TIMEOUT_S, eventually


@dataclass(slots=True, eq=False)
class Worker:
    """One running worker, laid open. `channel` is a client's way to it."""

    engine: Any
    """A SimulatedEngine unless the test brought another."""
    leases: HandoffSource
    reservations: HandoffTarget
    runtime: WorkerRuntime
    topology: RemoteTopology
    background: Background
    channels: ChannelPool
    channel: grpc.aio.Channel
    aheads: PullsAhead | None = None
    carried_by: Choice = "auto"
    """The session."""
    extras: dict[str, object] = field(default_factory=dict)

    @property
    def prefill_session(self) -> PrefillSession:
        session = self.extras.get("session") or PrefillSession(
            self.channel, self._id, self.runtime.record.address, self.carried_by
        )
        self.extras["session"] = session
        assert isinstance(session, PrefillSession)
        return session

    @property
    def decode_session(self) -> DecodeSession:
        session = self.extras.get("session") or DecodeSession(
            self.channel, self._id, self.runtime.record.address, self.carried_by
        )
        self.extras["session"] = session
        assert isinstance(session, DecodeSession)
        return session

    @property
    def load(self) -> Load:
        return self.runtime.load()

    def break_connections(self) -> None:
        """Ends the connections of the byte path to those who pull from here; it goes on listening."""
        source = self.extras["channel"].by_backend["tcp"]._inner._inner._source  # type: ignore[attr-defined]
        with source._lock:
            for wire in source._wires:
                wire.abort()

    @property
    def _id(self) -> str:
        return self.runtime.record.worker_id

    async def idle(self) -> None:
        """Returns when nothing runs, is reserved or is pinned; fails if the blocks do not add up then."""
        await eventually(lambda: self.runtime.load().idle, lambda: f"{self._id} is still busy: {self.runtime.load()}")
        # A released lease keeps its blocks until the thread that was sending them has noticed.
        pool = self.engine.kv
        await eventually(
            lambda: pool.get_utilization().used_blocks == 0, lambda: f"{self._id}: {pool.get_utilization()}"
        )
        assert pool.get_utilization().balanced, f"{self._id}: {pool.get_utilization()}"


Facade = Callable[[WorkerRecord, GrpcServer], Awaitable[WorkerRecord]]


class _Announced(RemoteTopology):
    """Registers, and thereby everywhere announces, the addresses that `facade` says."""

    runtime: WorkerRuntime

    def __init__(self, router: str, channels: ChannelPool, facade: Facade | None) -> None:
        super().__init__(router, channels)
        self._facade = facade

    async def register(self, record: WorkerRecord, ttl_s: float) -> Registration:
        if self._facade is not None:
            server = self.runtime._server
            assert server is not None
            record = self.runtime._record = await self._facade(record, server)
        return await super().register(record, ttl_s)


def test_config(*overrides: str) -> Config:
    settled = ("topology.lease_ttl_s=1.0", "transport.timeout_s=5.0", "kv_store.fetch=always")
    return load_config(None, {}, (*settled, *overrides))


test_config.__test__ = False  # type: ignore[attr-defined]


def _aheads(parts: Sequence[Part]) -> PullsAhead | None:
    servicers = [part.service.servicer for part in parts if part.role is WorkerRole.DECODE]
    return servicers[0]._decode._inner._aheads if servicers else None  # type: ignore[no-any-return]


@asynccontextmanager
async def worker(
    role: WorkerRole,
    router: str,
    *,
    engine: Engine | None = None,
    worker_id: str = "",
    config: Config | None = None,
    clock: Clock | None = None,
    store: bool = False,
    facade: Facade | None = None,
    changeable: bool = False,
) -> AsyncIterator[Worker]:
    """Composes a worker as `model_worker` does. `clock` is that of the leases; `store` lets it use a kv_store. `facade`
    says under which addresses others are to find it. `changeable`: it can have either role, as `services.worker`."""
    config, clock = config or test_config(), clock or SystemClock()
    engine = engine or SimulatedEngine()
    async with contextlib.AsyncExitStack() as stack:
        sequences = Sequences(engine)
        await engine.start(sequences.on_step)
        stack.push_async_callback(engine.close)
        channels = await stack.enter_async_context(ChannelPool())
        background = Background()
        stack.push_async_callback(background.close, grace_s=1.0)
        topology = _Announced(router, channels, facade)
        transfers = KvTransferClient(channels, min(CALL_TIMEOUT_S, config.transport.timeout_s))
        handoffs = HandoffLog(SystemClock(), config.transport.backend, "transport.backend says so")
        leases = HandoffSource(config.transport.lease_ttl_s, clock, engine.kv.free, observer=handoffs)
        reservations = HandoffTarget(config.transport.lease_ttl_s, clock, engine.kv.free, observer=handoffs)
        channel = make_channel(
            config.transport,
            engine.kv.regions(),
            leases,
            config.cluster.host,
            0,
            transfers.pull_rpc,
            lambda: engine.kv.layout,
        )
        runtime = WorkerRuntime(
            config,
            role,
            worker_id or f"{role}-0",
            pool=engine.kv,
            source=leases,
            handoffs=handoffs,
            target=reservations,
            channel=channel,
            topology=topology,
            model=engine.model,
            step_log=engine.step_log,
            metrics=CollectorRegistry(),
        )
        topology.runtime = runtime
        client = StoreClient(
            channels,
            topology,
            engine.kv.layout,
            channel.name,
            SystemClock(),
            replicas=config.kv_store.replicas,
            worker_id=worker_id or f"{role}-0",
        )
        shared = ModelWorker(
            config=config,
            engine=engine,
            channels=channels,
            sequences=sequences,
            channel=channel,
            transfers=transfers,
            releaser=LeaseReleaser(transfers, background),
            handoffs=handoffs,
            leases=leases,
            reservations=reservations,
            runtime=runtime,
            background=background,
            store=client if store else None,
        )
        parts = []
        if changeable or role.covers(WorkerRole.PREFILL):
            parts.append(prefill_part(shared, stack))
        if changeable or role.covers(WorkerRole.DECODE):
            parts.append(decode_part(shared, stack))
        in_flight = {part.role: part.in_flight for part in parts}
        stack.push_async_callback(runtime.close)
        await runtime.start([part.service for part in parts], lambda: load_of(shared, in_flight), in_flight)
        client_channels = await stack.enter_async_context(ChannelPool())
        made = Worker(
            engine=engine,
            leases=leases,
            reservations=reservations,
            runtime=runtime,
            topology=topology,
            background=background,
            channels=channels,
            channel=client_channels.get(runtime.record.address),
            aheads=_aheads(parts),
            extras={"channel": channel},
        )
        try:
            yield made
        finally:
            session = made.extras.get("session")
            if isinstance(session, PrefillSession | DecodeSession):
                await session.close()


def request(
    prompt: Sequence[int], max_new_tokens: int = 8, request_id: str = "r1", cache_salt: str = "", **sampling: object
) -> GenerationRequest:
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(request_id, "simulated", as_token_ids(prompt), params, cache_salt=cache_salt)


@dataclass(slots=True)
class Generated:
    tokens: list[int]
    finish_reason: FinishReason | None
    prefill: PrefillOutcome
    steps: list[DecodeStep]


async def decode_all(
    decode: Worker, wanted: GenerationRequest, emitted: Sequence[int], source: KvSource | None, attempt: int = 1
) -> list[DecodeStep]:
    steps = decode.decode_session.decode(wanted, attempt, emitted, source, timeout_s=TIMEOUT_S)
    async with aclosing(steps):
        return [step async for step in steps]


async def generate(
    prefill: Worker, decode: Worker, wanted: GenerationRequest, attempt: int = 1, peer: KvPeer | None = None
) -> Generated:
    """One request on its way through both, as the router does it."""
    ticket = await decode.decode_session.reserve(wanted, attempt, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(wanted, attempt, ticket, timeout_s=TIMEOUT_S, peer=peer)
    tokens = list(first.token_ids)
    if first.finish_reason is not None:
        decode.decode_session.release(wanted.request_id, attempt)
        return Generated(tokens, first.finish_reason, first, [])
    steps = await decode_all(decode, wanted, tokens, first.source, attempt)
    for step in steps:
        assert step.index == len(tokens), "a token was lost or told twice"
        tokens += step.token_ids
    return Generated(tokens, steps[-1].finish_reason, first, steps)
