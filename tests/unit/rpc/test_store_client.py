from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import InvalidRequest, PeerLost
from sagellm_common.core.topology import LinkCost, TopologySnapshot
from sagellm_common.core.types import KvLayout, WorkerRecord, WorkerRole, WorkerState, as_token_ids
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, extents, ranked
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.store_client import RETRY_AFTER_S, StoreClient
from tests.support.topology import LAYOUT, MODEL, make_record

HASHES = [bytes([i]) * 16 for i in range(3)]
HASHES_TOKENS = as_token_ids(range(48))
MANY = [n.to_bytes(16, "big") for n in range(10 * EXTENT_BLOCKS + 5)]


class FakeTopology:
    def __init__(self, *workers: WorkerRecord) -> None:
        self.workers = workers
        self.links: tuple[LinkCost, ...] = ()

    def snapshot(self) -> TopologySnapshot:
        return TopologySnapshot(1, "embedded", True, self.workers, self.links)


class FakeServicer(kv_pb2_grpc.KvStoreServiceServicer):
    def __init__(self) -> None:
        self.calls = 0
        self.fails = False
        self.layout: KvLayout | None = None
        self.most = 1000
        """Blocks it holds of an extent."""
        self.asked: list[bytes] = []

    async def Lookup(self, request: kv_pb2.KvLookupRequest, context: Any) -> kv_pb2.KvLookupResponse:
        self.calls += 1
        if self.fails:
            raise InvalidRequest("no")
        layout = codec.encode_layout(self.layout) if self.layout else None
        counts = [min(self.most, extent.num_blocks) for extent in request.extents]
        self.asked += [extent.key for extent in request.extents]
        return kv_pb2.KvLookupResponse(num_blocks=len(request.block_hashes) // 16, layout=layout, extent_blocks=counts)

    async def Get(self, request: kv_pb2.KvGetRequest, context: Any) -> kv_pb2.KvGetResponse:
        return kv_pb2.KvGetResponse()


def store_record(address: str, worker_id: str = "kv_store-0", **changes: Any) -> WorkerRecord:
    return make_record(worker_id, role=WorkerRole.KV_STORE, address=address, **changes)


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    async with ChannelPool() as pool:
        yield pool


@pytest.fixture
def servicer() -> FakeServicer:
    return FakeServicer()


@pytest.fixture
async def address(servicer: FakeServicer) -> AsyncIterator[str]:
    add = kv_pb2_grpc.add_KvStoreServiceServicer_to_server
    server = GrpcServer("127.0.0.1:0", [Registrar("sagellm.v1.KvStoreService", add, servicer)])
    port = await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def client(
    channels: ChannelPool, topology: FakeTopology, clock: ManualClock | None = None, replicas: int = 1
) -> StoreClient:
    return StoreClient(
        channels,
        topology,  # type: ignore[arg-type]
        LAYOUT,
        "tcp",
        clock or ManualClock(),
        replicas=replicas,
        worker_id="prefill-0",
    )


@asynccontextmanager
async def several(number: int) -> AsyncIterator[dict[str, tuple[WorkerRecord, FakeServicer]]]:
    """Stores by id."""
    add, found = kv_pb2_grpc.add_KvStoreServiceServicer_to_server, {}
    async with AsyncExitStack() as stack:
        for n in range(number):
            servicer = FakeServicer()
            servicer.layout = LAYOUT
            server = GrpcServer("127.0.0.1:0", [Registrar("sagellm.v1.KvStoreService", add, servicer)])
            address = f"127.0.0.1:{await server.start()}"
            stack.push_async_callback(server.stop, 0)
            found[f"kv_store-{n}"] = store_record(address, f"kv_store-{n}"), servicer
        yield found


async def test_a_lone_store_is_not_asked_what_it_holds(
    channels: ChannelPool, address: str, servicer: FakeServicer
) -> None:
    store = client(channels, FakeTopology(make_record(), store_record(address)))
    assert store.available
    assert await store.locate(HASHES, extents(HASHES), LAYOUT, timeout_s=5.0) == [{"kv_store-0": 3}]
    assert servicer.calls == 0
    assert await store.get("kv_store-0", HASHES, HASHES_TOKENS, LAYOUT, timeout_s=5.0) is None


async def test_what_is_offloaded_is_asked_for(channels: ChannelPool, address: str, servicer: FakeServicer) -> None:
    store = client(channels, FakeTopology(store_record(address)))
    servicer.most = 2
    assert await store.owned(HASHES, extents(HASHES), LAYOUT, timeout_s=5.0) == [{"kv_store-0": 2}]


async def test_each_store_is_asked_once_for_the_extents_it_may_hold(channels: ChannelPool) -> None:
    wanted = extents(MANY)
    async with several(4) as stores:
        store = client(channels, FakeTopology(*(record for record, _ in stores.values())), replicas=2)
        located = await store.locate(MANY, wanted, LAYOUT, timeout_s=5.0)
        owned = await store.owned(MANY, wanted, LAYOUT, timeout_s=5.0)
    for extent, holders, owners in zip(wanted, located, owned, strict=True):
        assert set(holders) == set(ranked(extent.key, stores)[:3])
        assert list(owners) == ranked(extent.key, stores)[:2] == store.owners(extent)
        assert set(holders.values()) == {extent.num_blocks}
    assert [servicer.calls for _, servicer in stores.values()] == [2] * 4


async def test_a_store_that_is_gone_holds_nothing_and_is_left_alone(channels: ChannelPool) -> None:
    async with several(2) as stores:
        gone = store_record("127.0.0.1:1", "kv_store-9")
        topology = FakeTopology(*(record for record, _ in stores.values()), gone)
        store = client(channels, topology, ManualClock(), replicas=3)
        located = await store.locate(MANY, extents(MANY), LAYOUT, timeout_s=5.0)
        assert all(set(holders) == set(stores) for holders in located)
        assert "kv_store-9" not in store.owners(extents(MANY)[0])
        assert store.left_alone


async def test_a_store_of_another_layout_is_offered_nothing(channels: ChannelPool) -> None:
    async with several(2) as stores:
        stores["kv_store-1"][1].layout = replace(LAYOUT, block_size_tokens=32)
        store = client(channels, FakeTopology(*(record for record, _ in stores.values())), replicas=2)
        owned = await store.owned(MANY, extents(MANY), LAYOUT, timeout_s=5.0)
        assert all(set(owners) == {"kv_store-0"} for owners in owned)
        assert await store.layout() == LAYOUT, "the first by id is right"


def test_all_workers_propose_the_same_layout_to_empty_stores(channels: ChannelPool) -> None:
    big = replace(LAYOUT, block_size_tokens=32)
    other = make_record(
        "decode-0", role=WorkerRole.DECODE, model=replace(MODEL, kv_layout=replace(big, model_fingerprint="x"))
    )
    first = make_record("decode-1", role=WorkerRole.DECODE, model=replace(MODEL, kv_layout=big))
    store = client(channels, FakeTopology(other, first, make_record("prefill-0")))
    assert store.first_layout() == big
    assert client(channels, FakeTopology(make_record())).first_layout() == LAYOUT


def test_the_nearest_is_on_this_host_then_least_busy_then_quickest(channels: ChannelPool) -> None:
    topology = FakeTopology(
        make_record(),
        store_record("a:1", "far", host_id="there"),
        *(store_record("a:1", store_id) for store_id in ("near", "quick")),
    )
    topology.links = (LinkCost("quick", "prefill-0", "tcp", 0.0, 2e9), LinkCost("near", "prefill-0", "tcp", 0.0, 1e9))
    store = client(channels, topology)
    assert store.nearest(["far", "near", "quick"]) == "quick"
    with store.reading("quick"):
        assert store.nearest(["far", "near", "quick"]) == "near"
    assert store.nearest(["far"]) == "far"


async def test_its_layout_is_asked_for_once_a_store(
    channels: ChannelPool, address: str, servicer: FakeServicer
) -> None:
    topology = FakeTopology(store_record(address))
    store = client(channels, topology, ManualClock())
    assert await store.layout(timeout_s=5.0) is None  # nothing was put yet
    servicer.layout = replace(LAYOUT, block_size_tokens=32)
    assert [await store.layout(timeout_s=5.0) for _ in range(3)] == [servicer.layout] * 3
    assert servicer.calls == 2
    topology.workers = (store_record(address, incarnation="its next life"),)
    servicer.layout = LAYOUT
    assert await store.layout(timeout_s=5.0) == LAYOUT


async def test_a_failed_store_is_left_alone_for_a_while(
    channels: ChannelPool, address: str, servicer: FakeServicer
) -> None:
    clock = ManualClock(100.0)
    store = client(channels, FakeTopology(store_record(address)), clock)
    servicer.fails = True
    with pytest.raises(InvalidRequest):
        await store.owned(HASHES, extents(HASHES), LAYOUT, timeout_s=5.0)
    servicer.fails = False
    for _ in range(3):
        assert not store.available
        with pytest.raises(PeerLost, match="no kv_store"):
            await store.owned(HASHES, extents(HASHES), LAYOUT, timeout_s=5.0)
        with pytest.raises(PeerLost, match="kv_store-0 is not in reach"):
            await store.get("kv_store-0", HASHES, HASHES_TOKENS, LAYOUT)
    assert servicer.calls == 1
    clock.advance(RETRY_AFTER_S)
    assert await store.owned(HASHES, extents(HASHES), LAYOUT, timeout_s=5.0) == [{"kv_store-0": 3}]


@pytest.mark.parametrize("workers", [(), (make_record(),), (store_record("127.0.0.1:1", state=WorkerState.DRAINING),)])
async def test_no_store(channels: ChannelPool, workers: tuple[WorkerRecord, ...]) -> None:
    store = client(channels, FakeTopology(*workers), ManualClock())
    assert not store.available
    with pytest.raises(PeerLost):
        await store.locate(HASHES, extents(HASHES), LAYOUT)
