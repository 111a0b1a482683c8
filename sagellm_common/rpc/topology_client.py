"""The router's embedded topology, as its workers reach it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from sagellm_common.core.errors import PeerLost, SageError
from sagellm_common.core.registration import RETRY_S, open_registration
from sagellm_common.core.topology import LinkCost, Registration, SnapshotFeed, TopologySnapshot
from sagellm_common.core.types import WorkerRecord
from sagellm_common.rpc.channels import ChannelPool, call, stream
from sagellm_common.rpc.codec import decode_link, decode_worker_record, encode_link, encode_worker_record
from sagellm_common.rpc.gen.sagellm.v1 import topology_pb2, topology_pb2_grpc

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.0


class RemoteTopology:
    """A TopologyStore over TopologyService; keeps the last snapshot while the router is away.

    `pool` stays the caller's; without one, the topology has its own.
    """

    def __init__(
        self, router_address: str, pool: ChannelPool | None = None, *, connect_timeout_s: float = 10.0
    ) -> None:
        self._address = router_address
        self._own_pool = ChannelPool() if pool is None else None
        self._pool = pool or self._own_pool or ChannelPool()
        self._connect_timeout_s = connect_timeout_s
        self._feed = SnapshotFeed(TopologySnapshot(revision=0, backend="embedded", connected=False))
        self._follower: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()

    async def start(self) -> None:
        if self._follower is None:
            self._follower = asyncio.create_task(self._follow(), name="topology-watch")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connected.wait()
        except TimeoutError:
            await self._stop()
            raise PeerLost(
                f"no router answers at {self._address} within {self._connect_timeout_s:g} s; is it running?"
            ) from None

    async def register(self, record: WorkerRecord, ttl_s: float) -> Registration:
        return await open_registration(self, record, ttl_s, connect_timeout_s=self._connect_timeout_s)

    def snapshot(self) -> TopologySnapshot:
        return self._feed.current

    def changes(self) -> AsyncIterator[TopologySnapshot]:
        return self._feed.changes()

    async def close(self) -> None:
        await self._stop()
        self._feed.close()
        if self._own_pool is not None:
            await self._own_pool.close()

    async def _stop(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower

    # ---- leases ----

    async def grant(self, record: WorkerRecord, ttl_s: float) -> str:
        request = topology_pb2.RegisterRequest(record=encode_worker_record(record), ttl_ms=round(ttl_s * 1000))
        answer = await call(
            self._stub.Register, request, timeout_s=CALL_TIMEOUT_S, response=topology_pb2.RegisterResponse
        )
        return answer.lease_id

    async def keep_alive(self, lease_id: str, record: WorkerRecord) -> None:
        request = topology_pb2.KeepAliveRequest(lease_id=lease_id, record=encode_worker_record(record))
        await call(self._stub.KeepAlive, request, timeout_s=CALL_TIMEOUT_S, response=topology_pb2.KeepAliveResponse)

    async def put_links(self, lease_id: str, links: Sequence[LinkCost]) -> None:
        request = topology_pb2.KeepAliveRequest(lease_id=lease_id, links=map(encode_link, links))
        await call(self._stub.KeepAlive, request, timeout_s=CALL_TIMEOUT_S, response=topology_pb2.KeepAliveResponse)

    async def revoke(self, lease_id: str) -> None:
        request = topology_pb2.DeregisterRequest(lease_id=lease_id)
        await call(self._stub.Deregister, request, timeout_s=CALL_TIMEOUT_S, response=topology_pb2.DeregisterResponse)

    @property
    def _stub(self) -> topology_pb2_grpc.TopologyServiceStub:
        stub: topology_pb2_grpc.TopologyServiceStub = topology_pb2_grpc.TopologyServiceStub(
            self._pool.get(self._address)
        )
        return stub

    # ---- following ----

    async def _follow(self) -> None:
        while True:
            try:
                watch = stream(
                    self._stub.Watch,
                    topology_pb2.WatchTopologyRequest(),
                    timeout_s=None,
                    response=topology_pb2.TopologySnapshot,
                )
                async with aclosing(watch) as snapshots:
                    async for message in snapshots:
                        self._feed.publish(_decode_snapshot(message))
                        self._connected.set()
            except SageError as err:
                if self._feed.current.connected:
                    log.warning("topology of router %s is away, trying on: %s", self._address, err)
            self._feed.publish(replace(self._feed.current, connected=False))
            await asyncio.sleep(RETRY_S)


def _decode_snapshot(message: topology_pb2.TopologySnapshot) -> TopologySnapshot:
    return TopologySnapshot(
        revision=message.revision,
        backend=message.backend,
        connected=message.connected,
        workers=tuple(decode_worker_record(status.record) for status in message.workers),
        links=tuple(decode_link(link) for link in message.links),
    )
