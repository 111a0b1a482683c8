"""The store over its wire: a real server, a real byte path, a source beside it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import (
    ConfigError,
    Draining,
    InvalidRequest,
    KvCorrupt,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    SageError,
)
from sagellm_common.core.kv import Tier
from sagellm_common.core.types import BlockHash, KvLayout, TokenIds, WorkerRecord, WorkerRole, pack_int32
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc import codec
from sagellm_common.rpc.block_journal import BlockJournal
from sagellm_common.rpc.channels import ChannelPool, call, stream
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2, kv_pb2, kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.kv_transfer_service import KvTransferServicer
from sagellm_common.rpc.server import GrpcServer, Registrar
from services.kv_store.extents import ExtentTable
from services.kv_store.loop import KvStore
from services.kv_store.servicer import KvStoreServicer
from tests.support.kv_channels import HOST, Cluster, Side, a_layout, blocks_of

LAYOUT = a_layout(block_bytes=64, block_size_tokens=4)
BUDGET_BLOCKS = 8
LEASE_TTL_S = 10.0


@dataclass
class Worker:
    record: WorkerRecord
    draining: bool = False

    def check_accepting(self) -> None:
        if self.draining:
            raise Draining("draining")


@dataclass
class Running:
    pool: HierarchyManager
    leases: HandoffSource
    clock: ManualClock
    worker: Worker
    stub: kv_pb2_grpc.KvStoreServiceStub
    transfers: KvTransferClient
    source: Side

    async def put(self, num_blocks: int, *, layout: KvLayout = LAYOUT, first_block: int = 0) -> kv_pb2.KvPutResponse:
        """Offers blocks of the source as KV of tokens 0, 1, 2, …"""
        hashes, token_ids = chain(num_blocks)
        blocks = np.arange(first_block, first_block + num_blocks, dtype=np.int32)
        pinned = self.source.pin("offload:r", blocks)
        try:
            request = kv_pb2.KvPutRequest(
                block_hashes=codec.encode_hashes(hashes),
                source=codec.encode_kv_source(pinned),
                layout=codec.encode_layout(layout),
                token_ids=pack_int32(token_ids),
            )
            return await call(self.stub.Put, request, timeout_s=10.0)
        finally:
            self.source.leases.release("offload:r", 1, committed=True)

    async def get(self, num_blocks: int, *, layout: KvLayout = LAYOUT, backend: str = "tcp") -> kv_pb2.KvGetResponse:
        hashes, token_ids = chain(num_blocks)
        request = kv_pb2.KvGetRequest(
            block_hashes=codec.encode_hashes(hashes),
            layout=codec.encode_layout(layout),
            backend=backend,
            token_ids=pack_int32(token_ids),
        )
        return await call(self.stub.Get, request, timeout_s=10.0)

    def counts(self) -> tuple[int, int, int]:
        stats = self.pool.get_utilization()
        assert stats.balanced, stats
        return stats.used_blocks, stats.free_blocks, stats.cached_blocks


def chain(num_blocks: int) -> tuple[list[BlockHash], TokenIds]:
    token_ids = np.arange(4 * num_blocks, dtype=np.int32)
    return block_hashes(token_ids, 4, root_hash(LAYOUT)), token_ids


@pytest.fixture
async def store() -> AsyncIterator[Running]:
    clock = ManualClock()
    pool = HierarchyManager(HostKvPool(BUDGET_BLOCKS * 64, clock))
    leases = HandoffSource(LEASE_TTL_S, clock, pool.free)
    channel = make_channel(TransportConfig(timeout_s=5.0), pool.regions, leases, HOST, 0)
    worker = Worker(WorkerRecord("store-0", WorkerRole.KV_STORE, "", await channel.start(), "store-0-1", 1))
    services = [
        Registrar(
            "sagellm.v1.KvStoreService",
            kv_pb2_grpc.add_KvStoreServiceServicer_to_server,
            KvStoreServicer(
                KvStore(pool, leases, channel, worker, ExtentTable(pool.lookup), pin_share=0.5),
                BlockJournal(pool, clock, 3, Tier.HOST),
            ),
        ),
        Registrar(
            "sagellm.v1.KvTransferService",
            kv_pb2_grpc.add_KvTransferServiceServicer_to_server,
            KvTransferServicer(leases, channel, None, "store-0", "store-0-1"),
        ),
    ]
    server = GrpcServer(f"{HOST}:0", services)
    address = f"{HOST}:{await server.start()}"
    worker.record = replace(worker.record, address=address)
    sources = Cluster("tcp")
    source = await sources.side("decode-0", num_blocks=16, block_bytes=64)
    async with ChannelPool() as channels:
        stub = kv_pb2_grpc.KvStoreServiceStub(channels.get(address))
        yield Running(pool, leases, clock, worker, stub, KvTransferClient(channels), source)
    await server.stop(0.1)
    await channel.close()
    await sources.close()


async def test_what_was_put_can_be_got(store: Running) -> None:
    assert (await store.get(3)).num_blocks == 0, "an empty store has no layout yet"
    answer = await store.put(3, first_block=5)
    assert (answer.num_stored, answer.num_present, answer.bytes_pulled) == (3, 0, 192)
    again = await store.put(4)
    assert (again.num_stored, again.num_present, again.bytes_pulled) == (1, 3, 64)
    assert store.counts() == (0, 4, 4)

    got = await store.get(6)
    assert got.num_blocks == 4
    source = codec.decode_kv_source(got.source)
    assert (source.worker_id, source.num_tokens, source.backend) == ("store-0", 16, "tcp")
    assert store.counts() == (4, 4, 0)
    await store.transfers.handshake(source, worker_id="prefill-0", incarnation="p", layout=LAYOUT)
    targets = np.array([15, 9, 14, 10], dtype=np.int32)
    await store.source.channel.pull(Pull(source, source.block_table, targets, timeout_s=10.0))
    assert blocks_of(store.source.region, targets) == blocks_of(store.source.region, np.array([5, 6, 7, 3]))
    await store.transfers.release(source, committed=True)
    assert store.counts() == (0, 4, 4)


async def test_a_get_that_nobody_releases_expires(store: Running) -> None:
    await store.put(2)
    source = codec.decode_kv_source((await store.get(2)).source)
    assert source.lease_expires_in_ms == 10_000
    store.clock.advance(LEASE_TTL_S)
    assert store.leases.expire() == 1
    assert store.counts() == (0, 6, 2)
    with pytest.raises(LeaseExpired):
        await store.source.channel.pull(Pull(source, source.block_table, np.array([8, 9]), timeout_s=10.0))


async def test_two_gets_have_leases_of_their_own(store: Running) -> None:
    await store.put(2)
    one, two = [codec.decode_kv_source((await store.get(2)).source) for _ in range(2)]
    assert one.transfer_id != two.transfer_id
    await store.transfers.release(one, committed=True)
    assert store.counts() == (2, 6, 0)
    await store.transfers.release(two, committed=False)
    assert store.counts() == (0, 6, 2)


@pytest.mark.parametrize("fault", ["lease", "gone", "corrupt"])
async def test_a_failed_put_leaves_nothing(store: Running, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error: type[SageError]
    if fault == "lease":
        error = LeaseExpired
        monkeypatch.setattr(store.source, "pin", store.source.source)
    elif fault == "gone":
        error = PeerLost
        await store.source.channel.close()
    else:
        error, send = KvCorrupt, Wire.send
        # Without the place to put them the digests stay zero.
        monkeypatch.setattr(
            Wire, "send", lambda wire, head, pieces=None, tail=b"", taken=None: send(wire, head, pieces, tail)
        )
    with pytest.raises(error):
        await store.put(3)
    assert store.counts() == (0, BUDGET_BLOCKS, 0)
    assert store.pool.cached_hashes() == []


async def test_a_put_whose_caller_leaves_is_undone(store: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_common.comm_backend.backends import socket_source
    from tests.support.kv_channels import Gate

    gate = Gate(socket_source.blocks)
    monkeypatch.setattr(socket_source, "blocks", gate)
    with gate.opening():
        put = asyncio.create_task(store.put(3))
        assert await asyncio.to_thread(gate.reached.wait, 20)
        assert store.counts() == (3, 5, 0)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put
        async with asyncio.timeout(10):
            while store.counts() != (0, BUDGET_BLOCKS, 0):  # noqa: ASYNC110  # the server has no event to wait for
                await asyncio.sleep(0.01)
    assert store.pool.cached_hashes() == []


async def test_another_layout_is_refused(store: Running) -> None:
    await store.put(2)
    other = replace(LAYOUT, model_fingerprint="other")
    for attempt in (store.put(2, layout=other), store.get(2, layout=other)):
        with pytest.raises(LayoutMismatch, match="model_fingerprint"):
            await attempt
    lookup = kv_pb2.KvLookupRequest(block_hashes=bytes(16), layout=codec.encode_layout(other))
    with pytest.raises(LayoutMismatch):
        await call(store.stub.Lookup, lookup, timeout_s=10.0)
    assert store.counts() == (0, 6, 2)


async def test_a_lookup_in_another_block_size_finds_nothing_and_says_which_is_stored(store: Running) -> None:
    larger = a_layout(block_bytes=128, block_size_tokens=8)

    async def lookup() -> kv_pb2.KvLookupResponse:
        message = kv_pb2.KvLookupRequest(
            block_hashes=codec.encode_hashes(chain(2)[0]), layout=codec.encode_layout(larger)
        )
        return await call(store.stub.Lookup, message, timeout_s=10.0)

    assert not (await lookup()).HasField("layout")
    await store.put(2)
    answer = await lookup()
    assert answer.num_blocks == 0
    assert codec.decode_layout(answer.layout) == LAYOUT


async def test_bad_requests(store: Running) -> None:
    await store.put(2)
    hashes, _ = chain(2)
    good_source = codec.encode_kv_source(store.source.source("t", np.array([1, 2], dtype=np.int32)))
    layout = codec.encode_layout(LAYOUT)
    bad: list[tuple[object, object, type[SageError], str]] = [
        (store.stub.Lookup, kv_pb2.KvLookupRequest(block_hashes=b"odd", layout=layout), InvalidRequest, "block_hashes"),
        (store.stub.Lookup, kv_pb2.KvLookupRequest(block_hashes=bytes(16)), InvalidRequest, "layout"),
        (store.stub.Pin, kv_pb2.KvPinRequest(block_hashes=bytes(16), ttl_ms=-1), InvalidRequest, "ttl_ms is -1"),
        (
            store.stub.Put,
            kv_pb2.KvPutRequest(
                block_hashes=codec.encode_hashes(chain(3)[0]), source=good_source, layout=layout, token_ids=b""
            ),
            InvalidRequest,
            "block_table has 2 blocks of 4 tokens for 3 block hashes of 4",
        ),
        (
            store.stub.Put,
            kv_pb2.KvPutRequest(
                block_hashes=codec.encode_hashes(hashes), source=good_source, layout=layout, token_ids=pack_int32([1])
            ),
            InvalidRequest,
            "token_ids has 1 tokens",
        ),
    ]
    for method, request, error, message in bad:
        with pytest.raises(error, match=message):
            await call(method, request, timeout_s=10.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"transport\.backend is 'tcp' here and 'gloo'"):
        await store.get(2, backend="gloo")
    assert store.counts() == (0, 6, 2)
    assert (await store.get(2)).num_blocks == 2


async def test_what_computing_costs_the_callers_is_what_blocks_are_worth(store: Running) -> None:
    await store.put(3)
    hashes, token_ids = chain(2)
    request = kv_pb2.KvGetRequest(
        block_hashes=codec.encode_hashes(hashes),
        layout=codec.encode_layout(LAYOUT),
        backend="tcp",
        token_ids=pack_int32(token_ids),
        recompute_cost=codec.encode_recompute_cost(RecomputeCost(1.0, 1.0)),
    )
    await call(store.stub.Get, request, timeout_s=10.0)
    with store.pool._lock:
        facts = store.pool._facts(hashes[0], 0)
    assert facts.recompute_s == RecomputeCost(1.0, 1.0).seconds(0, 4)
    assert store.pool.pool._cost_of(1) > store.pool.pool._cost_of(0) == 1.0


async def test_a_draining_store_takes_nothing_new(store: Running) -> None:
    await store.put(2)
    store.worker.draining = True
    for attempt in (store.put(2), store.get(2)):
        with pytest.raises(Draining):
            await attempt
    assert store.counts() == (0, 6, 2)


async def test_lookup_and_pin(store: Running) -> None:
    await store.put(3)
    hashes, _ = chain(5)
    packed = codec.encode_hashes(hashes)
    lookup = kv_pb2.KvLookupRequest(block_hashes=packed, layout=codec.encode_layout(LAYOUT))
    assert (await call(store.stub.Lookup, lookup, timeout_s=10.0)).num_blocks == 3
    pin = kv_pb2.KvPinRequest(block_hashes=packed, ttl_ms=5000)
    assert (await call(store.stub.Pin, pin, timeout_s=10.0)).num_pinned == 3
    assert store.counts() == (3, 5, 0)
    unpin = kv_pb2.KvPinRequest(block_hashes=packed, ttl_ms=0)
    assert (await call(store.stub.Pin, unpin, timeout_s=10.0)).num_pinned == 0
    assert store.counts() == (0, 5, 3)


async def test_watchers_follow_from_where_they_were(store: Running) -> None:
    hashes, _ = chain(5)

    async def next_of(messages: AsyncIterator[kv_pb2.WatchBlocksResponse]) -> tuple[int, int, bool, list[bytes]]:
        async with asyncio.timeout(10):
            message = await anext(messages)
        assert message.tier == common_pb2.KV_TIER_HOST
        stored = codec.decode_hashes(message.stored_hashes)
        return message.since_revision, message.revision, message.snapshot, stored

    def watch(**known: Any) -> contextlib.aclosing[AsyncIterator[kv_pb2.WatchBlocksResponse]]:  # type: ignore[type-var]
        request = kv_pb2.WatchBlocksRequest(**known)
        return contextlib.aclosing(stream(store.stub.WatchBlocks, request, timeout_s=None))

    await store.put(1)
    async with watch() as messages:
        assert await next_of(messages) == (0, 2, True, hashes[:1])
        await store.put(2)
        assert await next_of(messages) == (2, 3, False, hashes[1:2])
    await store.put(3)
    await store.put(4)
    async with watch(from_revision=3) as messages:
        assert await next_of(messages) == (3, 5, False, hashes[2:4])
    for stranger in ({"from_revision": 77}, {"from_revision": 3, "incarnation": "another"}):
        async with watch(**stranger) as messages:
            assert await next_of(messages) == (0, 5, True, hashes[:4])
    await store.put(5)
    async with watch(from_revision=2) as messages:  # the history is three blocks long
        assert await next_of(messages) == (0, 6, True, hashes)


async def test_pins_cannot_fill_the_store(store: Running) -> None:
    """Half of it here, over the wire; what is beyond is not pinned, and with its time a pin ends."""
    await store.put(6)
    hashes, _ = chain(6)
    request = kv_pb2.KvPinRequest(block_hashes=codec.encode_hashes(hashes), ttl_ms=10_000)
    assert (await call(store.stub.Pin, request, timeout_s=10.0)).num_pinned == BUDGET_BLOCKS // 2
    assert store.counts() == (4, 2, 2)
    store.clock.advance(10)
    assert store.counts() == (0, 2, 6)


@pytest.mark.parametrize("extents", [True, False])
async def test_a_long_put_is_worked_off_in_pieces(
    store: Running, monkeypatch: pytest.MonkeyPatch, extents: bool
) -> None:
    """Found as a whole when it is there; other calls get their turn in between."""
    from services.kv_store import loop

    monkeypatch.setattr(loop, "PIECE_BLOCKS", 3)
    hashes, token_ids = chain(7)
    pieces: list[int] = []
    begin_put = store.pool.begin_put

    def counted(hashes: list[BlockHash], *rest: Any) -> Any:
        pieces.append(len(hashes))
        return begin_put(hashes, *rest)

    monkeypatch.setattr(store.pool, "begin_put", counted)
    pinned = store.source.pin("offload:r", np.arange(7, dtype=np.int32))
    sizes = [2, 1, 4] if extents else []
    request = kv_pb2.KvPutRequest(
        block_hashes=codec.encode_hashes(hashes),
        source=codec.encode_kv_source(pinned),
        layout=codec.encode_layout(LAYOUT),
        token_ids=pack_int32(token_ids),
        extents=[kv_pb2.KvExtent(key=b"%016d" % n, num_blocks=size) for n, size in enumerate(sizes)],
    )
    answer = await call(store.stub.Put, request, timeout_s=10.0)
    assert (answer.num_stored, answer.bytes_pulled) == (7, 7 * 64)
    assert pieces == (sizes or [3, 3, 1])
    got = codec.decode_kv_source((await store.get(7)).source)
    await store.transfers.handshake(got, worker_id="prefill-0", incarnation="p", layout=LAYOUT)
    targets = np.arange(8, 15, dtype=np.int32)
    await store.source.channel.pull(Pull(got, got.block_table, targets, timeout_s=10.0))
    assert blocks_of(store.source.region, targets) == blocks_of(store.source.region, np.arange(7))
    lookup = kv_pb2.KvLookupRequest(
        block_hashes=codec.encode_hashes(hashes), layout=request.layout, extents=request.extents
    )
    assert list((await call(store.stub.Lookup, lookup, timeout_s=10.0)).extent_blocks) == sizes
