"""A worker with a model: what it has whatever its role, and the roles it can have.

    services/prefill ──► Part ┐
    services/decode  ──► Part ┴─► serve: one engine, one pool, one byte path, one record in the topology

A process with the parts of both may change between them while it runs: see `WorkerRuntime.set_role`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import Config
from sagellm_common.core.types import WorkerRole
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import Engine
from sagellm_common.engines.sequences import Sequences
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.store_fetch import StoreFetch
from sagellm_common.rpc.worker_main import WorkerArgs, make_topology
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from sagellm_common.rpc.worker_service import Load


@dataclass(frozen=True, slots=True)
class ModelWorker:
    """What its parts share. `store` None: there is no kv_store."""

    config: Config
    engine: Engine
    sequences: Sequences
    channels: ChannelPool
    channel: PathsChannel
    transfers: KvTransferClient
    releaser: LeaseReleaser
    handoffs: HandoffLog
    leases: HandoffSource
    reservations: HandoffTarget
    runtime: WorkerRuntime
    background: Background
    store: StoreClient | None

    @property
    def fetch(self) -> StoreFetch | None:
        return StoreFetch(self.store, self.channel, self.releaser, self.engine.kv) if self.store else None


@dataclass(frozen=True, slots=True)
class Part:
    """What a worker does in one role, PREFILL or DECODE. `in_flight` are the requests it has taken and not answered."""

    role: WorkerRole
    service: Registrar
    in_flight: Callable[[], int]


MakePart = Callable[[ModelWorker, AsyncExitStack], Part]
"""On the stack goes what the part has to close."""


def load_of(worker: ModelWorker, in_flight: Mapping[WorkerRole, Callable[[], int]]) -> Load:
    """Raises EngineFailed."""
    running = worker.engine.stats().running
    taken = sum(count() for count in in_flight.values())
    return Load(
        running_requests=running,
        waiting_requests=max(0, taken - running),
        reservations=len(worker.reservations),
        pinned_transfers=len(worker.leases),
    )


async def serve(args: WorkerArgs, *make_parts: MakePart) -> None:
    """Composes a worker of these parts and serves until told to stop."""
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(_model_worker(args))
        parts = [make(worker, stack) for make in make_parts]
        in_flight = {part.role: part.in_flight for part in parts}
        await worker.runtime.run([part.service for part in parts], lambda: load_of(worker, in_flight), in_flight)


@asynccontextmanager
async def _model_worker(args: WorkerArgs) -> AsyncIterator[ModelWorker]:
    config, clock = args.config, SystemClock()
    async with AsyncExitStack() as stack:
        engine = make_engine(config)
        stack.push_async_callback(engine.close)
        sequences = Sequences(engine)
        await engine.start(sequences.on_step)
        channels = await stack.enter_async_context(ChannelPool())
        background = Background()
        stack.push_async_callback(background.close, grace_s=1.0)
        topology = make_topology(config, args.router, channels)
        transfers = KvTransferClient(channels)
        handoffs = HandoffLog(clock, config.transport.backend, "transport.backend says so")
        leases = HandoffSource(config.transport.lease_ttl_s, clock, engine.kv.free, observer=handoffs)
        reservations = HandoffTarget(config.transport.lease_ttl_s, clock, engine.kv.free, observer=handoffs)
        channel = make_channel(
            config.transport,
            engine.kv.regions(),
            leases,
            config.cluster.host,
            args.data_port,
            transfers.pull_rpc,
            lambda: engine.kv.layout,
        )
        runtime = WorkerRuntime(
            args.loaded,
            args.role,
            args.worker_id,
            pool=engine.kv,
            source=leases,
            handoffs=handoffs,
            target=reservations,
            channel=channel,
            topology=topology,
            model=engine.model,
            engine_ended=engine.ended,
            step_log=engine.step_log,
            engine=engine.description,
            port=args.port,
            session_port=args.session_port,
            metrics_port=args.metrics_port,
        )
        store = StoreClient(
            channels,
            topology,
            engine.kv.layout,
            channel.name,
            clock,
            replicas=config.kv_store.replicas,
            worker_id=args.worker_id,
        )
        yield ModelWorker(
            config=config,
            engine=engine,
            sequences=sequences,
            channels=channels,
            channel=channel,
            transfers=transfers,
            releaser=LeaseReleaser(transfers, background),
            handoffs=handoffs,
            leases=leases,
            reservations=reservations,
            runtime=runtime,
            background=background,
            store=store if config.kv_store.enabled else None,
        )
