"""A worker's part in prefilling, composed."""

from __future__ import annotations

from contextlib import AsyncExitStack

from sagellm_common.comm_backend import OverlapRule
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.types import WorkerRole
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2_grpc
from sagellm_common.rpc.model_worker import ModelWorker, Part
from sagellm_common.rpc.peer_fetch import PeerFetch
from sagellm_common.rpc.server import Registrar
from services.prefill.attempts import IdempotentPrefill
from services.prefill.fetch_costs import FetchCosts
from services.prefill.loop import PrefillLoop
from services.prefill.servicer import PrefillServicer
from services.prefill.telemetry import ObservedPrefill


def prefill_part(worker: ModelWorker, stack: AsyncExitStack) -> Part:
    config, kv, store = worker.config, worker.engine.kv, worker.store

    def learned(cost: RecomputeCost) -> None:
        """Blocks that are dear to compute again stay for longer, here and in the stores."""
        kv.price(cost.per_block(kv.layout.block_size_tokens))
        if store is not None:
            store.recompute_cost = cost

    loop = PrefillLoop(
        worker.engine,
        worker.sequences,
        worker.leases,
        worker.runtime,
        worker.fetch,
        SystemClock(),
        OverlapRule(worker.channel),
        FetchCosts(kv.layout, always=config.kv_store.fetch == "always", learned=learned),
        PeerFetch(worker.transfers, worker.channel, worker.releaser, kv, worker.runtime),
    )
    prefill = IdempotentPrefill(ObservedPrefill(loop), worker.leases)
    stack.push_async_callback(prefill.close)
    servicer = PrefillServicer(prefill, config.router.request_timeout_s)
    service = Registrar("sagellm.v1.PrefillService", worker_pb2_grpc.add_PrefillServiceServicer_to_server, servicer)
    return Part(WorkerRole.PREFILL, service, loop.in_flight)
