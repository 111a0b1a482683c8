"""A worker's part in decoding, composed."""

from __future__ import annotations

from contextlib import AsyncExitStack

from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2_grpc
from sagellm_common.rpc.model_worker import ModelWorker, Part
from sagellm_common.rpc.routes import RouteSigner
from sagellm_common.rpc.server import Registrar
from sagellm_common.rpc.sessions import PrefillSession
from sagellm_common.rpc.worker_sessions import WorkerSessions
from services.decode.ahead import PullsAhead
from services.decode.loop import DecodeLoop
from services.decode.offload import Offloader
from services.decode.pull import KvPuller
from services.decode.routed import RoutedRequests
from services.decode.servicer import DecodeServicer
from services.decode.telemetry import ObservedDecode


def decode_part(worker: ModelWorker, stack: AsyncExitStack) -> Part:
    engine, channel, layout = worker.engine, worker.channel, worker.engine.kv.layout
    puller = KvPuller(
        channel,
        worker.transfers,
        worker.releaser,
        worker.runtime,
        engine.kv,
        lambda: channel.settings.now,
        worker.handoffs,
        channel.bytes_per_s,
    )
    offload = None
    if worker.store is not None:
        blocks = engine.kv.regions().num_blocks
        offload = Offloader(worker.store, worker.leases, worker.runtime, layout, worker.background, blocks)
    aheads = PullsAhead(worker.reservations, puller)
    stack.callback(aheads.close)
    loop = DecodeLoop(
        engine,
        worker.sequences,
        worker.reservations,
        worker.leases,
        worker.runtime,
        puller,
        aheads,
        offload,
        worker.fetch,
    )
    prefills = WorkerSessions(PrefillSession, worker.channels, worker.config.rpc.session)
    stack.push_async_callback(prefills.close)
    observed = ObservedDecode(loop, worker.handoffs)
    servicer = DecodeServicer(
        observed,
        worker.config.router.request_timeout_s,
        RoutedRequests(observed, prefills),
        RouteSigner(worker.config.rpc.route_key),
    )
    service = Registrar("sagellm.v1.DecodeService", worker_pb2_grpc.add_DecodeServiceServicer_to_server, servicer)
    return Part(WorkerRole.DECODE, service, loop.in_flight)
