"""`python -m services.kv_store`: composes a KV store and serves until told to stop."""

from __future__ import annotations

import sys

from prometheus_client import REGISTRY

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.process import leave
from sagellm_common.core.types import WorkerRole
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.worker_main import WorkerArgs, make_topology, worker_main
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from services.kv_store.loop import KvStore
from services.kv_store.servicer import KvStoreServicer
from services.kv_store.telemetry import StoreCollector


async def compose(args: WorkerArgs) -> None:
    config, clock = args.config, SystemClock()
    pool = HostKvPool(config.kv_store.budget_bytes, clock, eviction=config.kv_store.eviction)
    REGISTRY.register(StoreCollector(pool))
    async with ChannelPool() as channels:
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
            topology=make_topology(config, args.router, channels),
            port=args.port,
            metrics_port=args.metrics_port,
        )
        store = KvStore(pool, leases, channel, runtime)
        service = Registrar(
            "sagellm.v1.KvStoreService",
            kv_pb2_grpc.add_KvStoreServiceServicer_to_server,
            KvStoreServicer(store, runtime.journal),
        )
        await runtime.run([service], store.load)


if __name__ == "__main__":
    leave(worker_main(WorkerRole.KV_STORE, compose, sys.argv[1:]))
