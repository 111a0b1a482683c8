"""TopologyService: what the router knows of its workers, and the embedded topology's registrations."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import grpc

from sagellm_common.core.errors import ConfigError, InvalidRequest, SageError
from sagellm_common.core.topology import TopologySnapshot, TopologyStore
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRecord
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.codec import decode_link, decode_worker_record, encode_link, encode_worker_record
from sagellm_common.rpc.gen.sagellm.v1 import topology_pb2, topology_pb2_grpc, worker_pb2
from sagellm_common.rpc.worker_client import (
    WorkerStatus,
    drain,
    encode_status,
    probe_links,
    set_eviction,
    set_role,
    set_transport,
)

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
StatusOf = Callable[[WorkerRecord], Awaitable[WorkerStatus | None]]
ExplainPlan = Callable[[str], Awaitable[topology_pb2.ExplainPlanResponse]]
SetStrategy = Callable[[topology_pb2.SetStrategyRequest], topology_pb2.SetStrategyResponse]

STATUS_TIMEOUT_S = 1.0
MAX_TTL_S = 3600.0


class TopologyServicer(topology_pb2_grpc.TopologyServiceServicer):
    """`status` asks a worker for its live numbers (None: unknown); `explain`, `cost_model` and `set_strategy` are the
    router's, which has the plans and has learned what they cost."""

    def __init__(
        self,
        topology: TopologyStore,
        channels: ChannelPool,
        status: StatusOf,
        explain: ExplainPlan,
        cost_model: Callable[[], Mapping[str, Any]] = dict,
        set_strategy: SetStrategy | None = None,
    ) -> None:
        self._cost_model = cost_model
        self._set_strategy = set_strategy
        self._topology = topology
        self._channels = channels
        self._status_of = status
        self._explain = explain

    async def Get(self, request: topology_pb2.GetTopologyRequest, context: Context) -> topology_pb2.TopologySnapshot:
        return await self._encode(self._topology.snapshot())

    async def Watch(
        self, request: topology_pb2.WatchTopologyRequest, context: Context
    ) -> AsyncIterator[topology_pb2.TopologySnapshot]:
        # Stores make their changes() from an async generator, which must be closed with the call.
        changes = cast("Any", self._topology.changes())
        async with aclosing(changes) as snapshots:
            async for snapshot in snapshots:
                yield await self._encode(snapshot)

    async def ExplainPlan(
        self, request: topology_pb2.ExplainPlanRequest, context: Context
    ) -> topology_pb2.ExplainPlanResponse:
        if not request.request_id:
            raise InvalidRequest("request_id is empty: name the request to explain")
        return await self._explain(request.request_id)

    async def GetCostModel(
        self, request: topology_pb2.GetCostModelRequest, context: Context
    ) -> topology_pb2.GetCostModelResponse:
        return topology_pb2.GetCostModelResponse(state_json=json.dumps(self._cost_model()))

    async def Register(self, request: topology_pb2.RegisterRequest, context: Context) -> topology_pb2.RegisterResponse:
        embedded = self._embedded()
        ttl_s = request.ttl_ms / 1000
        if not 0 < ttl_s <= MAX_TTL_S:
            raise InvalidRequest(f"ttl_ms is {request.ttl_ms}, but must be 1 to {int(MAX_TTL_S * 1000)}")
        lease_id = await embedded.grant(decode_worker_record(request.record), ttl_s)
        return topology_pb2.RegisterResponse(lease_id=lease_id)

    async def KeepAlive(
        self, request: topology_pb2.KeepAliveRequest, context: Context
    ) -> topology_pb2.KeepAliveResponse:
        embedded = self._embedded()
        record = decode_worker_record(request.record) if request.HasField("record") else None
        await embedded.keep_alive(request.lease_id, record)
        if request.links:
            await embedded.put_links(request.lease_id, [decode_link(link, "links") for link in request.links])
        return topology_pb2.KeepAliveResponse(ttl_ms=round(embedded.ttl_s(request.lease_id) * 1000))

    async def Deregister(
        self, request: topology_pb2.DeregisterRequest, context: Context
    ) -> topology_pb2.DeregisterResponse:
        await self._embedded().revoke(request.lease_id)
        return topology_pb2.DeregisterResponse()

    async def ProbeLinks(
        self, request: topology_pb2.ProbeLinksRequest, context: Context
    ) -> topology_pb2.ProbeLinksResponse:
        """One target after the other, so that probes do not measure each other."""
        workers = self._workers([])
        response = topology_pb2.ProbeLinksResponse()
        for target in self._workers(request.target_ids):
            sources = [worker for worker in workers if worker.worker_id != target.worker_id]
            try:
                found = await probe_links(self._channels.get(target.address), sources, request.max_bytes)
            except SageError as err:
                response.failures.append(f"{target.worker_id}: {err.reason} {err.message}")
            else:
                response.links.extend(found.links)
                response.failures.extend(found.failures)
        return response

    async def SetTransport(
        self, request: topology_pb2.SetTransportRequest, context: Context
    ) -> topology_pb2.SetTransportResponse:
        response = topology_pb2.SetTransportResponse()
        for worker in self._workers(request.worker_ids):
            try:
                told = await set_transport(self._channels.get(worker.address), request.settings)
            except SageError as err:
                response.workers.add(worker_id=worker.worker_id, error=f"{err.reason} {err.message}")
            else:
                response.workers.add(worker_id=worker.worker_id, in_force=told.in_force, changes=told.changes)
        return response

    async def SetEviction(
        self, request: topology_pb2.SetEvictionRequest, context: Context
    ) -> topology_pb2.SetEvictionResponse:
        response = topology_pb2.SetEvictionResponse()
        for worker in self._workers(request.worker_ids):
            try:
                told = await set_eviction(self._channels.get(worker.address), request.policy, request.migration)
            except SageError as err:
                response.workers.add(worker_id=worker.worker_id, error=f"{err.reason} {err.message}")
            else:
                response.workers.add(
                    worker_id=worker.worker_id,
                    policy=told.policy,
                    cached_blocks=told.cached_blocks,
                    migration=told.migration,
                )
        return response

    async def SetWorkerRole(
        self, request: topology_pb2.SetWorkerRoleRequest, context: Context
    ) -> worker_pb2.SetRoleResponse:
        return await set_role(self._channels.get(self._worker(request.worker_id).address), request.change)

    async def DrainWorker(self, request: topology_pb2.DrainWorkerRequest, context: Context) -> worker_pb2.DrainResponse:
        # The shared channel is closed once the worker has left the topology, which may be before its answer is here.
        async with ChannelPool() as own:
            return await drain(own.get(self._worker(request.worker_id).address), request.grace_ms)

    def _worker(self, worker_id: str) -> WorkerRecord:
        """Raises InvalidRequest."""
        if not worker_id:
            raise InvalidRequest("worker_id is empty: name the worker")
        return self._workers([worker_id])[0]

    async def SetStrategy(
        self, request: topology_pb2.SetStrategyRequest, context: Context
    ) -> topology_pb2.SetStrategyResponse:
        if self._set_strategy is None:
            raise InvalidRequest("nothing is placed here: ask a router")
        return self._set_strategy(request)

    def _workers(self, worker_ids: Sequence[str]) -> list[WorkerRecord]:
        """Those named, or all. Raises InvalidRequest."""
        snapshot = self._topology.snapshot()
        if unknown := [worker_id for worker_id in worker_ids if snapshot.find(worker_id) is None]:
            known = ", ".join(worker.worker_id for worker in snapshot.workers) or "none"
            raise InvalidRequest(f"there is no worker {', '.join(unknown)}; known: {known}")
        return [worker for worker in snapshot.workers if not worker_ids or worker.worker_id in worker_ids]

    def _embedded(self) -> EmbeddedTopology:
        if isinstance(self._topology, EmbeddedTopology):
            return self._topology
        backend = self._topology.snapshot().backend
        raise ConfigError(
            f"this router's topology is {backend}: workers register there themselves; "
            f"start the worker with topology.backend={backend}"
        )

    async def _encode(self, snapshot: TopologySnapshot) -> topology_pb2.TopologySnapshot:
        statuses = await asyncio.gather(*(self._status(record) for record in snapshot.workers))
        return topology_pb2.TopologySnapshot(
            revision=snapshot.revision,
            backend=snapshot.backend,
            connected=snapshot.connected,
            workers=statuses,
            links=map(encode_link, snapshot.links),
        )

    async def _status(self, record: WorkerRecord) -> worker_pb2.WorkerStatus:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                status = await self._status_of(record)
        except (SageError, TimeoutError) as err:
            # Registered, yet silent: shown without numbers until its lease ends.
            log.debug("no status of worker %s: %s", record.worker_id, err)
            status = None
        if status is None:
            return worker_pb2.WorkerStatus(record=encode_worker_record(record))
        return encode_status(replace(status, record=record))
