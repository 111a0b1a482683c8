"""The topology in etcd: one key per worker under a lease, followed by a watch from the revision of a list.

    /sagellm/v1/<cluster>/workers/<worker_id>     = JSON of the WorkerRecord
    /sagellm/v1/<cluster>/links/<source>/<target> = JSON of the LinkCost, under the target's lease

Client: etcd3aio, because etcd3 0.12.0 does not import with protobuf >= 4, and this one is grpc.aio over all endpoints.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from etcd3aio.connections import ConnectionManager
from etcd3aio.errors import EtcdError
from etcd3aio.kv import KVService, prefix_range_end
from etcd3aio.lease import LeaseService
from etcd3aio.watch import WatchCreateRequest, WatchRequest, WatchService

# etcd3aio lets gRPC's own errors through; this is the one file of core that knows them.
from grpc import RpcError
from grpc.aio import UsageError
from pydantic import TypeAdapter, ValidationError

from sagellm_common.core.errors import ConfigError, LeaseExpired, PeerLost, WorkerIdTaken
from sagellm_common.core.registration import RETRY_S, open_registration
from sagellm_common.core.topology import LinkCost, Registration, SnapshotFeed, TopologySnapshot
from sagellm_common.core.types import WorkerRecord

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.5
RELIST_S = 1.0
"""The watch brings changes at once; the list, read from the quorum, is the truth behind it: it notices an etcd that
hangs or has lost its data, and heals a watch whose member was cut off."""

# A UsageError is a call on a connection that the follower has just closed.
_ETCD_ERRORS = (EtcdError, RpcError, UsageError, OSError, TimeoutError)
_PUT = 0
_record_json = TypeAdapter(WorkerRecord)
_link_json = TypeAdapter(LinkCost)


class EtcdTopology:
    """A TopologyStore. `endpoints` are all of etcd's host:port; any of them that answers will do.

    Raises ConfigError for endpoints that are none.
    """

    def __init__(self, endpoints: Sequence[str], cluster: str, *, connect_timeout_s: float = 10.0) -> None:
        self._endpoints = [_host_port(endpoint) for endpoint in endpoints]
        if not self._endpoints:
            raise ConfigError("topology.endpoints is empty: list etcd's host:port, or use topology.backend embedded")
        self._root = f"/sagellm/v1/{cluster}/"
        self._prefix = f"{self._root}workers/"
        self._links_prefix = f"{self._root}links/"
        self._connect_timeout_s = connect_timeout_s
        self._etcd: _Etcd | None = None
        self._records: dict[bytes, WorkerRecord] = {}
        self._links: dict[bytes, LinkCost] = {}
        self._revision = 0
        self._feed = SnapshotFeed(TopologySnapshot(revision=0, backend="etcd", connected=False))
        self._follower: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()

    async def start(self) -> None:
        if self._follower is None:
            self._follower = asyncio.create_task(self._follow(), name="etcd-follow")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connected.wait()
        except TimeoutError:
            await self._stop()
            raise PeerLost(f"{self._whom} does not answer within {self._connect_timeout_s:g} s; is it up?") from None

    async def register(self, record: WorkerRecord, ttl_s: float) -> Registration:
        return await open_registration(self, record, ttl_s, connect_timeout_s=self._connect_timeout_s)

    def snapshot(self) -> TopologySnapshot:
        return self._feed.current

    def changes(self) -> AsyncIterator[TopologySnapshot]:
        return self._feed.changes()

    async def close(self) -> None:
        await self._stop()
        self._feed.close()

    async def _stop(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower

    # ---- leases ----

    async def grant(self, record: WorkerRecord, ttl_s: float) -> str:
        key = self._prefix + record.worker_id
        async with self._calling() as etcd:
            held = await etcd.get(key)
            unchanged = KVService.txn_compare_create_revision(key, 0)
            if held is not None:
                holder = _decode(held.value)
                if holder is None or holder.incarnation != record.incarnation:
                    raise _taken(record.worker_id, holder)
                unchanged = KVService.txn_compare_value(key, held.value)
            # etcd counts leases in whole seconds.
            lease_id = (await etcd.lease.grant(ttl=math.ceil(ttl_s))).ID
            put = KVService.txn_op_put(key, _record_json.dump_json(record), lease=lease_id)
            if not (await etcd.kv.txn(compare=[unchanged], success=[put], failure=[])).succeeded:
                # Another process was quicker, or the client repeated a write of ours whose answer got lost.
                held = await etcd.get(key)
                if held is None or held.lease != lease_id:
                    await etcd.lease.revoke(lease_id)
                    raise _taken(record.worker_id, _decode(held.value) if held else None)
            return str(lease_id)

    async def keep_alive(self, lease_id: str, record: WorkerRecord) -> None:
        key, value = self._prefix + record.worker_id, _record_json.dump_json(record)
        async with self._calling() as etcd:
            await etcd.renew(int(lease_id))
            held = await etcd.get(key)
            # A key deleted by hand leaves its lease alive, and the id open to others.
            if held is None or held.lease != int(lease_id):
                raise LeaseExpired(f"lease {lease_id} holds no worker any more; register again")
            if held.value != value:
                await etcd.kv.put(key, value, lease=int(lease_id))

    async def put_links(self, lease_id: str, links: Sequence[LinkCost]) -> None:
        async with self._calling() as etcd:
            for link in links:
                key = f"{self._links_prefix}{link.source_id}/{link.target_id}"
                await etcd.kv.put(key, _link_json.dump_json(link), lease=int(lease_id))

    async def revoke(self, lease_id: str) -> None:
        async with self._calling() as etcd:
            await etcd.lease.revoke(int(lease_id))

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[_Etcd]:
        """The connection, for a few calls within CALL_TIMEOUT_S. Whatever fails in etcd is a PeerLost."""
        if self._etcd is None:
            raise PeerLost(f"{self._whom} is away")
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                yield self._etcd
        except _ETCD_ERRORS as err:
            raise PeerLost(f"{self._whom} failed: {err or type(err).__name__}") from err
        except asyncio.CancelledError as err:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # gRPC says CancelledError also when the channel is closed underneath the call.
            raise PeerLost(f"the connection to {self._whom} was closed during the call") from err

    # ---- following ----

    async def _follow(self) -> None:
        """An outage ends with a new connection: names are resolved anew, no backoff of gRPC's is inherited."""
        while True:
            try:
                async with _connected(self._endpoints) as etcd:
                    self._revision = 0
                    await self._list(etcd)
                    self._etcd = etcd
                    self._connected.set()
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._watch(etcd, self._revision + 1))
                        group.create_task(self._relist(etcd))
            except* _ETCD_ERRORS as errors:
                if self._feed.current.connected:
                    log.warning("%s is away, trying on: %s", self._whom, errors.exceptions[0])
            finally:
                self._etcd = None
            self._publish(connected=False)
            await asyncio.sleep(RETRY_S)

    async def _relist(self, etcd: _Etcd) -> None:
        while True:
            await asyncio.sleep(RELIST_S)
            await self._list(etcd)

    async def _list(self, etcd: _Etcd) -> None:
        known = self._revision
        async with asyncio.timeout(CALL_TIMEOUT_S):
            answer = await etcd.kv.get(self._root, range_end=prefix_range_end(self._root))
        if answer.header.revision < known:
            raise EtcdError(f"etcd went back from revision {known} to {answer.header.revision}")
        # Not when the watch has overtaken the list meanwhile.
        if answer.header.revision >= self._revision:
            self._revision = answer.header.revision
            self._records.clear()
            self._links.clear()
            for kv in answer.kvs:
                self._take(kv.key, kv.value)
        self._publish(connected=True)

    async def _watch(self, etcd: _Etcd, revision: int) -> None:
        async with aclosing(etcd.watch.once(self._root, revision)) as responses:
            async for response in responses:
                if response.canceled or response.compact_revision:
                    raise EtcdError("the watch fell behind etcd's compaction")
                self._apply([event for event in response.events if event.kv.mod_revision > self._revision])
        raise EtcdError("the watch ended")

    def _apply(self, events: Sequence[Any]) -> None:
        for event in events:
            self._revision = event.kv.mod_revision
            self._records.pop(event.kv.key, None)
            self._links.pop(event.kv.key, None)
            if event.type == _PUT:
                self._take(event.kv.key, event.kv.value)
        if events:
            self._publish(connected=True)

    def _take(self, key: bytes, value: bytes) -> None:
        if key.startswith(self._prefix.encode()):
            if record := _decode(value):
                self._records[key] = record
        elif key.startswith(self._links_prefix.encode()) and (link := _decode_link(value)):
            self._links[key] = link

    def _publish(self, *, connected: bool) -> None:
        workers = tuple(self._records[key] for key in sorted(self._records))
        links = tuple(self._links[key] for key in sorted(self._links))
        current = self._feed.current
        if (connected, workers, links) != (current.connected, current.workers, current.links):
            self._feed.publish(TopologySnapshot(self._revision, "etcd", connected, workers, links))

    @property
    def _whom(self) -> str:
        return "etcd at " + ", ".join(f"{host}:{port}" for host, port in self._endpoints)


@dataclass(frozen=True, slots=True)
class _Etcd:
    """One connection: etcd3aio's services over one channel to all endpoints."""

    kv: KVService
    lease: LeaseService
    watch: _Watch

    async def get(self, key: str) -> Any | None:
        """The key as etcd's KeyValue (value, lease), or None."""
        found = (await self.kv.get(key)).kvs
        return found[0] if found else None

    async def renew(self, lease_id: int) -> None:
        """Raises LeaseExpired for a lease that is no more."""
        answers: Any = self.lease.keep_alive(lease_id)
        try:
            async for answer in answers:
                if answer.TTL <= 0:
                    raise LeaseExpired(f"lease {lease_id} has ended; register again")
                return
        finally:
            answers.cancel()
        raise EtcdError("the keepalive ended without an answer")


class _Watch(WatchService):  # type: ignore[misc]  # etcd3aio is untyped to us
    """One watch stream, which ends when etcd does: the follower then lists and watches anew.

    etcd3aio's own `watch` goes on by itself, from the revision after the last header it saw; events that were still
    to come for that header are lost so, and it waits for ever on a compacted revision.
    """

    async def once(self, prefix: str, revision: int) -> AsyncGenerator[Any, None]:
        left = asyncio.Event()

        async def requests() -> AsyncIterator[Any]:
            end = prefix_range_end(prefix)
            yield WatchRequest(
                create_request=WatchCreateRequest(key=prefix.encode(), range_end=end, start_revision=revision)
            )
            await left.wait()

        # "hasleader" makes a member that lost the quorum end the watch instead of staying silent.
        answers: Any = self._stub.Watch(requests(), metadata=(("hasleader", "true"),))
        try:
            async for answer in answers:
                yield answer
        finally:
            left.set()
            answers.cancel()


@asynccontextmanager
async def _connected(endpoints: Sequence[tuple[str, int]]) -> AsyncIterator[_Etcd]:
    # etcd3aio dials IPv4 addresses only, so names are resolved here.
    loop = asyncio.get_running_loop()
    addresses = []
    for host, port in endpoints:
        # A member that is away may have lost its name too; the others will do.
        with suppress(socket.gaierror):
            found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
            addresses.append("{}:{}".format(*found[0][4]))
    if not addresses:
        raise EtcdError("none of the names resolves")
    manager = ConnectionManager(addresses)
    manager.grpc_options += [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    channel = manager.get_channel()
    try:
        yield _Etcd(KVService(channel), LeaseService(channel), _Watch(channel))
    finally:
        await channel.close(None)


def _host_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("http://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"topology.endpoints has {endpoint!r}, but needs host:port, such as 10.0.0.7:2379")
    return host, int(port)


@lru_cache(maxsize=1024)
def _decode(value: bytes) -> WorkerRecord | None:
    """None for what is no worker record, so that one bad key cannot blind the router.

    Cached, for each list repeats the last one's values, and a bad one is worth one warning.
    """
    try:
        return _record_json.validate_json(value)
    except ValidationError as err:
        log.warning("ignoring a value in etcd that is no worker record: %s", err.errors()[0]["msg"])
        return None


@lru_cache(maxsize=1024)
def _decode_link(value: bytes) -> LinkCost | None:
    """As `_decode`."""
    try:
        return _link_json.validate_json(value)
    except ValidationError as err:
        log.warning("ignoring a value in etcd that is no link cost: %s", err.errors()[0]["msg"])
        return None


def _taken(worker_id: str, holder: WorkerRecord | None) -> WorkerIdTaken:
    address = holder.address if holder else "an unknown address"
    return WorkerIdTaken(
        f"worker id {worker_id!r} is held by another process at {address}; "
        "give each worker an id of its own, or stop the other one",
        metadata={"worker_id": worker_id, "address": address},
    )
