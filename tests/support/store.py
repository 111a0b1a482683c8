"""A kv_store as its `__main__` composes it, in the test's process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.types import WorkerRole
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.topology_client import RemoteTopology
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from services.kv_store.loop import KvStore
from services.kv_store.servicer import KvStoreServicer
from tests.support.waiting import eventually
from tests.support.workers import Worker, test_config


@asynccontextmanager
async def kv_store(router: str) -> AsyncIterator[HierarchyManager]:
    config, clock = test_config(), SystemClock()
    pool = HierarchyManager(HostKvPool(1 << 20, clock))
    async with contextlib.AsyncExitStack() as stack:
        channels = await stack.enter_async_context(ChannelPool())
        leases = HandoffSource(config.transport.lease_ttl_s, clock, pool.free)
        pull_rpc = KvTransferClient(channels).pull_rpc
        channel = make_channel(
            config.transport, pool.regions, leases, config.cluster.host, 0, pull_rpc, lambda: pool.layout
        )
        runtime = WorkerRuntime(
            config,
            WorkerRole.KV_STORE,
            "kv_store-0",
            pool=pool,
            source=leases,
            channel=channel,
            topology=RemoteTopology(router, channels),
            metrics=CollectorRegistry(),
        )
        store = KvStore(pool, leases, channel, runtime)
        service = Registrar(
            "sagellm.v1.KvStoreService",
            kv_pb2_grpc.add_KvStoreServiceServicer_to_server,
            KvStoreServicer(store, runtime.journal),
        )
        stack.push_async_callback(runtime.close)
        await runtime.start([service], store.load)
        yield pool
        await eventually(lambda: runtime.load().idle, lambda: f"the store is still busy: {runtime.load()}")


async def sees_the_store(*workers: Worker) -> None:
    for one in workers:
        topology = one.topology
        await eventually(lambda topology=topology: topology.snapshot().find("kv_store-0") is not None)  # type: ignore[misc]
