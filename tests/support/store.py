"""A kv_store as its `__main__` composes it, in the test's process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.types import WorkerRole
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.topology_client import RemoteTopology
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from services.kv_store.extents import ExtentTable
from services.kv_store.loop import KvStore
from services.kv_store.replication import Replicator
from services.kv_store.servicer import KvStoreServicer
from tests.support.waiting import eventually
from tests.support.workers import Worker, test_config


@asynccontextmanager
async def kv_store(
    router: str, worker_id: str = "kv_store-0", *, replicas: int = 1, replicates: bool = False, drains: bool = False
) -> AsyncIterator[HierarchyManager]:
    """Left, it is gone; with `drains`, after what a worker does that is told to stop."""
    config, clock = test_config(), SystemClock()
    pool = HierarchyManager(HostKvPool(1 << 20, clock))
    async with contextlib.AsyncExitStack() as stack:
        channels = await stack.enter_async_context(ChannelPool())
        background = Background()
        stack.push_async_callback(background.close)
        topology = RemoteTopology(router, channels)
        leases = HandoffSource(config.transport.lease_ttl_s, clock, pool.free)
        pull_rpc = KvTransferClient(channels).pull_rpc
        channel = make_channel(
            config.transport, pool.regions, leases, config.cluster.host, 0, pull_rpc, lambda: pool.layout
        )
        runtime = WorkerRuntime(
            config,
            WorkerRole.KV_STORE,
            worker_id,
            pool=pool,
            source=leases,
            channel=channel,
            topology=topology,
            metrics=CollectorRegistry(),
        )
        extents = ExtentTable(pool.lookup)
        replicator = Replicator(
            pool.pool,
            extents,
            leases,
            runtime,
            topology,
            lambda layout: StoreClient(
                channels, topology, layout, channel.name, clock, replicas=replicas, worker_id=worker_id
            ),
            1e9,
        )
        if replicates:
            background.spawn(replicator.run(), "replication")
        store = KvStore(
            pool,
            leases,
            channel,
            runtime,
            extents,
            replicator=replicator if replicates else None,
            pin_share=config.kv_store.pin_share,
        )
        service = Registrar(
            "sagellm.v1.KvStoreService",
            kv_pb2_grpc.add_KvStoreServiceServicer_to_server,
            KvStoreServicer(store, runtime.journal),
        )
        stack.push_async_callback(runtime.close)
        await runtime.start([service], store.load)
        yield pool
        if drains:
            assert await runtime.drain() == 0
        await eventually(lambda: runtime.load().idle, lambda: f"the store is still busy: {runtime.load()}")


async def sees_the_store(*workers: Worker, store_ids: Sequence[str] = ("kv_store-0",)) -> None:
    """All of these stores, and no others."""

    def seen(worker: Worker) -> set[str]:
        records = worker.topology.snapshot().workers
        return {record.worker_id for record in records if record.role is WorkerRole.KV_STORE}

    for one in workers:
        await eventually(lambda one=one: seen(one) == set(store_ids), lambda one=one: f"{seen(one)}")  # type: ignore[misc]
