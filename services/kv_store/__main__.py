"""`python -m services.kv_store`: composes a KV store and serves until told to stop."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

from prometheus_client import REGISTRY

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import KvStoreConfig
from sagellm_common.core.process import leave
from sagellm_common.core.topology import TopologyStore
from sagellm_common.core.types import KvLayout, WorkerRole
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.kv_runtime.tiers import TierBackend
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.worker_main import WorkerArgs, make_topology, worker_main
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from services.kv_store.extents import ExtentTable
from services.kv_store.loop import KvStore
from services.kv_store.replication import Replicator
from services.kv_store.servicer import KvStoreServicer
from services.kv_store.telemetry import StoreCollector
from services.kv_store.transcoded import TranscodedTier, kept_layout


async def compose(args: WorkerArgs) -> None:
    config, clock = args.config, SystemClock()
    disk = open_disk(config.kv_store, args.worker_id)
    memory = HostKvPool(
        config.kv_store.budget_bytes, clock, eviction=config.kv_store.eviction, tenants=config.kv.tenants
    )
    pool = HierarchyManager(
        memory,
        lambda layout: [open_tier(disk, layout, config.kv_store.disk.dtype)] if disk else [],
        policy=config.kv_store.disk.migration,
        write=config.kv_store.disk.write,
    )
    REGISTRY.register(StoreCollector(pool))
    async with AsyncExitStack() as stack:
        if disk:
            stack.callback(disk.close)
        stack.callback(pool.close)
        channels = await stack.enter_async_context(ChannelPool())
        background = Background()
        stack.push_async_callback(background.close)
        topology = make_topology(config, args.router, channels)
        handoffs = HandoffLog(clock, config.transport.backend, "transport.backend says so")
        leases = HandoffSource(config.transport.lease_ttl_s, clock, pool.free, observer=handoffs)
        channel = make_channel(
            config.transport,
            pool.regions,
            leases,
            config.cluster.host,
            args.data_port,
            KvTransferClient(channels).pull_rpc,
            lambda: pool.layout,
        )
        runtime = WorkerRuntime(
            config,
            WorkerRole.KV_STORE,
            args.worker_id,
            pool=pool,
            source=leases,
            handoffs=handoffs,
            channel=channel,
            topology=topology,
            port=args.port,
            metrics_port=args.metrics_port,
        )
        extents = ExtentTable(pool.lookup)
        replicator = Replicator(
            memory,
            extents,
            leases,
            runtime,
            topology,
            lambda layout: StoreClient(
                channels,
                topology,
                layout,
                channel.name,
                clock,
                replicas=config.kv_store.replicas,
                worker_id=args.worker_id,
            ),
            config.kv_store.replication_bytes_per_s,
        )
        store = KvStore(
            pool,
            leases,
            channel,
            runtime,
            extents,
            disk.layouts if disk else tuple,
            replicator=replicator,
            pin_share=config.kv_store.pin_share,
        )
        service = Registrar(
            "sagellm.v1.KvStoreService",
            kv_pb2_grpc.add_KvStoreServiceServicer_to_server,
            KvStoreServicer(store, runtime.journal),
        )
        if disk:
            background.spawn(settle(store, pool, topology), "finding out whose blocks are on the disk")
        background.spawn(replicator.run(), "replication")
        await runtime.run([service], store.load)


def open_disk(config: KvStoreConfig, worker_id: str) -> TierDirectory | None:
    """None without a path. Raises ConfigError where it cannot be written, or another process uses it."""
    disk = config.disk
    if not disk.path:
        return None
    path = Path(disk.path).expanduser() / worker_id
    return TierDirectory(path, disk.budget_bytes, direct_io=disk.direct_io, eviction=config.eviction)


def open_tier(disk: TierDirectory, layout: KvLayout, dtype: str) -> TierBackend:
    """Raises ConfigError where the budget is below a block."""
    kept = kept_layout(layout, dtype)
    tier = disk.open(layout, kept)
    return tier if kept == layout else TranscodedTier(tier, layout, kept)


async def settle(store: KvStore, pool: HierarchyManager, topology: TopologyStore) -> None:
    """Once a worker is there that can use them, the blocks on the disk are found, before any is asked for."""
    async for snapshot in topology.changes():
        for worker in snapshot.workers:
            if worker.model is not None and not pool.settled:
                await store.settle(worker.model.kv_layout)
        if pool.settled:
            return


if __name__ == "__main__":
    leave(worker_main(WorkerRole.KV_STORE, compose, sys.argv[1:]))
