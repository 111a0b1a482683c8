"""A router's TopologyService and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.topology import TopologyStore
from sagellm_common.core.types import WorkerRecord
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import topology_pb2, topology_pb2_grpc
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.topology_service import StatusOf, TopologyServicer
from sagellm_common.rpc.worker_client import WorkerStatus


async def no_status(record: WorkerRecord) -> WorkerStatus | None:
    return None


async def no_plans(request_id: str) -> topology_pb2.ExplainPlanResponse:
    raise InvalidRequest(f"no plan of request {request_id!r} is kept")


@asynccontextmanager
async def topology_server(
    topology: TopologyStore, *, bind: str = "127.0.0.1:0", status: StatusOf = no_status
) -> AsyncIterator[str]:
    """Serves `topology`; yields host:port."""
    channels = ChannelPool()
    servicer = TopologyServicer(topology, channels, status, no_plans)
    add = topology_pb2_grpc.add_TopologyServiceServicer_to_server
    server = GrpcServer(bind, [Registrar("sagellm.v1.TopologyService", add, servicer)])
    await topology.start()
    port = await server.start()
    await server.set_serving(True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        await channels.close()
        await topology.close()
