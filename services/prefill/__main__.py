"""`python -m services.prefill`: composes a prefill worker and serves until told to stop."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack

from sagellm_common.comm_backend import OverlapRule, make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.process import leave
from sagellm_common.core.types import WorkerRole
from sagellm_common.engines import make_engine
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.peer_fetch import PeerFetch
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.store_client import StoreClient
from sagellm_common.rpc.store_fetch import StoreFetch
from sagellm_common.rpc.worker_main import WorkerArgs, make_topology, worker_main
from sagellm_common.rpc.worker_runtime import WorkerRuntime
from services.prefill.attempts import IdempotentPrefill
from services.prefill.fetch_costs import FetchCosts
from services.prefill.loop import PrefillLoop
from services.prefill.servicer import PrefillServicer
from services.prefill.telemetry import ObservedPrefill


async def compose(args: WorkerArgs) -> None:
    config, clock = args.config, SystemClock()
    async with AsyncExitStack() as stack:
        engine = make_engine(config)
        stack.push_async_callback(engine.close)
        # The callback is known before the loop that has it: nothing steps until something is submitted.
        loop: PrefillLoop
        await engine.start(lambda outputs: loop.on_step(outputs))
        channels = await stack.enter_async_context(ChannelPool())
        background = Background()
        stack.push_async_callback(background.close, grace_s=1.0)
        topology = make_topology(config, args.router, channels)
        transfers = KvTransferClient(channels)
        handoffs = HandoffLog(clock, config.transport.backend, "transport.backend says so")
        leases = HandoffSource(config.transport.lease_ttl_s, clock, engine.kv.free, observer=handoffs)
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
            WorkerRole.PREFILL,
            args.worker_id,
            pool=engine.kv,
            source=leases,
            handoffs=handoffs,
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
        store = client = None
        releaser = LeaseReleaser(transfers, background)
        if config.kv_store.enabled:
            client = StoreClient(
                channels,
                topology,
                engine.kv.layout,
                channel.name,
                clock,
                replicas=config.kv_store.replicas,
                worker_id=args.worker_id,
            )
            store = StoreFetch(client, channel, releaser, engine.kv)
        peers = PeerFetch(transfers, channel, releaser, engine.kv, runtime)

        def learned(cost: RecomputeCost) -> None:
            """Blocks that are dear to compute again stay for longer, here and in the stores."""
            engine.kv.price(cost.per_block(engine.kv.layout.block_size_tokens))
            if client is not None:
                client.recompute_cost = cost

        costs = FetchCosts(engine.kv.layout, always=config.kv_store.fetch == "always", learned=learned)
        loop = PrefillLoop(engine, leases, runtime, store, clock, OverlapRule(channel), costs, peers)
        prefill = IdempotentPrefill(ObservedPrefill(loop), leases)
        stack.push_async_callback(prefill.close)
        servicer = PrefillServicer(prefill, config.router.request_timeout_s)
        service = Registrar("sagellm.v1.PrefillService", worker_pb2_grpc.add_PrefillServiceServicer_to_server, servicer)
        await runtime.run([service], loop.load)


if __name__ == "__main__":
    leave(worker_main(WorkerRole.PREFILL, compose, sys.argv[1:]))
