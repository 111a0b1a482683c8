"""`python -m services.decode`: composes a decode worker and serves until told to stop."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.process import leave
from sagellm_common.core.types import WorkerRole
from sagellm_common.engines import make_engine
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.routes import RouteSigner
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.sessions import PrefillSession
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.store_fetch import StoreFetch
from sagellm_common.rpc.worker_main import WorkerArgs, make_topology, worker_main
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from sagellm_common.rpc.worker_sessions import WorkerSessions
from services.decode.ahead import PullsAhead
from services.decode.loop import DecodeLoop
from services.decode.offload import Offloader
from services.decode.pull import KvPuller
from services.decode.routed import RoutedRequests
from services.decode.servicer import DecodeServicer
from services.decode.telemetry import ObservedDecode


async def compose(args: WorkerArgs) -> None:
    config, clock = args.config, SystemClock()
    async with AsyncExitStack() as stack:
        engine = make_engine(config)
        stack.push_async_callback(engine.close)
        # The callback is known before the loop that has it: nothing steps until something is submitted.
        loop: DecodeLoop
        await engine.start(lambda outputs: loop.on_step(outputs))
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
            config,
            WorkerRole.DECODE,
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
        layout = engine.kv.layout
        releaser = LeaseReleaser(transfers, background)
        puller = KvPuller(
            channel,
            transfers,
            releaser,
            runtime,
            engine.kv,
            lambda: channel.settings.now,
            handoffs,
            channel.bytes_per_s,
        )
        offload = fetch = None
        if config.kv_store.enabled:
            store = StoreClient(
                channels,
                topology,
                layout,
                channel.name,
                clock,
                replicas=config.kv_store.replicas,
                worker_id=args.worker_id,
            )
            offload = Offloader(store, leases, runtime, layout, background, engine.kv.regions().num_blocks)
            fetch = StoreFetch(store, channel, releaser, engine.kv)
        aheads = PullsAhead(reservations, puller)
        stack.callback(aheads.close)
        loop = DecodeLoop(engine, reservations, leases, runtime, puller, aheads, offload, fetch)
        prefills = WorkerSessions(PrefillSession, channels, config.rpc.session)
        stack.push_async_callback(prefills.close)
        observed = ObservedDecode(loop, handoffs)
        servicer = DecodeServicer(
            observed,
            config.router.request_timeout_s,
            RoutedRequests(observed, prefills),
            RouteSigner(config.rpc.route_key),
        )
        service = Registrar("sagellm.v1.DecodeService", worker_pb2_grpc.add_DecodeServiceServicer_to_server, servicer)
        await runtime.run([service], loop.load)


if __name__ == "__main__":
    leave(worker_main(WorkerRole.DECODE, compose, sys.argv[1:]))
