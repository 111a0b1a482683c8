from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import InvalidRequest, PeerLost
from sagellm_common.core.topology import TopologySnapshot
from sagellm_common.core.types import KvLayout, WorkerRecord, WorkerRole, WorkerState, as_token_ids
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.store_client import RETRY_AFTER_S, StoreClient
from tests.support.topology import LAYOUT, make_record

HASHES = [bytes([i]) * 16 for i in range(3)]
HASHES_TOKENS = as_token_ids(range(48))


class FakeTopology:
    def __init__(self, *workers: WorkerRecord) -> None:
        self.workers = workers

    def snapshot(self) -> TopologySnapshot:
        return TopologySnapshot(1, "embedded", True, self.workers)


class FakeServicer(kv_pb2_grpc.KvStoreServiceServicer):
    def __init__(self) -> None:
        self.calls = 0
        self.fails = False
        self.layout: KvLayout | None = None

    async def Lookup(self, request: kv_pb2.KvLookupRequest, context: Any) -> kv_pb2.KvLookupResponse:
        self.calls += 1
        if self.fails:
            raise InvalidRequest("no")
        layout = codec.encode_layout(self.layout) if self.layout else None
        return kv_pb2.KvLookupResponse(num_blocks=len(request.block_hashes) // 16, layout=layout)

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


def client(channels: ChannelPool, topology: FakeTopology, clock: ManualClock) -> StoreClient:
    return StoreClient(channels, topology, LAYOUT, "tcp", clock)  # type: ignore[arg-type]


async def test_it_asks_the_store_of_the_topology(channels: ChannelPool, address: str) -> None:
    store = client(channels, FakeTopology(make_record(), store_record(address)), ManualClock())
    assert store.available
    assert await store.lookup(HASHES, LAYOUT, timeout_s=5.0) == 3
    assert await store.get(HASHES, HASHES_TOKENS, LAYOUT, timeout_s=5.0) is None


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
        await store.lookup(HASHES, LAYOUT, timeout_s=5.0)
    servicer.fails = False
    for _ in range(3):
        assert not store.available
        with pytest.raises(PeerLost, match="no kv_store"):
            await store.lookup(HASHES, LAYOUT, timeout_s=5.0)
    assert servicer.calls == 1
    clock.advance(RETRY_AFTER_S)
    assert await store.lookup(HASHES, LAYOUT, timeout_s=5.0) == 3


async def test_another_store_takes_over(channels: ChannelPool, address: str) -> None:
    dead, alive = store_record("127.0.0.1:1", "kv_store-0"), store_record(address, "kv_store-1")
    store = client(channels, FakeTopology(dead, alive), ManualClock())
    with pytest.raises(PeerLost):
        await store.lookup(HASHES, LAYOUT, timeout_s=5.0)
    assert await store.lookup(HASHES, LAYOUT, timeout_s=5.0) == 3


@pytest.mark.parametrize("workers", [(), (make_record(),), (store_record("127.0.0.1:1", state=WorkerState.DRAINING),)])
async def test_no_store(channels: ChannelPool, workers: tuple[WorkerRecord, ...]) -> None:
    store = client(channels, FakeTopology(*workers), ManualClock())
    assert not store.available
    with pytest.raises(PeerLost):
        await store.lookup(HASHES, LAYOUT)
