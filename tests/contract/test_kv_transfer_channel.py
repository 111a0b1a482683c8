"""What every byte path does (`KVTransferChannel`)."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from sagellm_common.comm_backend.backends import socket_source
from sagellm_common.comm_backend.backends.mock import Faults
from sagellm_common.comm_backend.backends.nccl_staging import DeviceStaging
from sagellm_common.comm_backend.backends.torch_pair import HostStaging, TorchPair
from sagellm_common.comm_backend.bridge import Buffers, Incoming
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.comm_backend.transcode import Transcoder, row_bytes
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core.errors import Draining, InvalidRequest, KvCorrupt, LayoutMismatch, LeaseExpired, PeerLost
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds, KvLayout
from tests.support.kv_channels import BACKENDS, Cluster, Gate, Side, blocks_of, random_region

TIMEOUT_S = 10.0
DIGESTS = {
    "shm": "sagellm_common.comm_backend.backends.shm_source",
    "mooncake": "sagellm_common.comm_backend.backends.mooncake_source",
    "mock": "sagellm_common.comm_backend.backends.mock",
}
"""Where a source takes its digests: the place to come between them and the bytes. tcp takes them as it sends."""


@pytest.fixture(params=BACKENDS)
async def workers(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    workers = Cluster(request.param)
    yield workers
    await workers.close()


def ids(*values: int) -> BlockIds:
    return np.array(values, dtype=np.int32)


def permuted(num_blocks: int, seed: int, take: int | None = None) -> BlockIds:
    return np.random.default_rng(seed).permutation(num_blocks)[:take].astype(np.int32)


async def in_thread(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20), "it never happened"


async def moved(source: Side, target: Side, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
    """Pulls, and checks every byte of the target's pool."""
    before = target.region.view.tobytes()
    pinned = source.pin("t", source_blocks)
    result = await target.channel.pull(Pull(pinned, source_blocks, target_blocks, timeout_s=TIMEOUT_S))
    size = source.region.block_bytes
    assert (result.blocks, result.bytes) == (len(source_blocks), len(source_blocks) * size)
    expected = bytearray(before)
    for from_block, to_block in zip(source_blocks.tolist(), target_blocks.tolist(), strict=True):
        expected[to_block * size : (to_block + 1) * size] = source.region.block(from_block)
    assert target.region.view.tobytes() == expected
    source.leases.release("t", 1, committed=True)


@pytest.mark.parametrize(
    ("source_blocks", "target_blocks"),
    [
        (ids(), ids()),
        (ids(3), ids(60)),
        (ids(5, 6, 7, 8), ids(10, 11, 12, 13)),
        (ids(5, 6, 7, 8), ids(40, 2, 41, 0)),
        (ids(63, 0, 1, 7, 8, 2), ids(0, 1, 63, 62, 30, 31)),
        (permuted(64, 1), permuted(64, 2)),
        (permuted(64, 3, 17), permuted(64, 4, 17)),
    ],
    ids=["none", "one", "run", "run-to-ragged", "ragged", "all-permuted", "some-permuted"],
)
async def test_moves_blocks(workers: Cluster, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    await moved(source, target, source_blocks, target_blocks)


@pytest.mark.parametrize(
    "transport",
    [
        {"chunk_bytes": 1},
        {"chunk_bytes": 200, "pipeline_depth": 1},
        {"chunk_bytes": 64 * 5, "pipeline_depth": 5},
        {"fusion": "off", "pipeline_depth": 3},
    ],
    ids=["each-block", "depth-1", "five-of-five", "one-message"],
)
async def test_moves_blocks_in_messages_of_any_size(workers: Cluster, transport: dict[str, object]) -> None:
    """However the receiver is set; the source follows."""
    source, target = await workers.side("source"), await workers.side("target", transport=transport)
    await moved(source, target, permuted(64, 5, 33), permuted(64, 6, 33))
    await moved(source, target, permuted(64, 7, 3), permuted(64, 8, 3))


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 16 << 10, 3 << 20], ids=["tiny", "16K", "larger-than-a-group"])
async def test_moves_blocks_of_any_size(workers: Cluster, block_bytes: int, digest: bool) -> None:
    num_blocks = 3000 if block_bytes == 1 else max(8, (10 << 20) // block_bytes)
    source = await workers.side("source", num_blocks=num_blocks, block_bytes=block_bytes, digest=digest)
    target = await workers.side("target", num_blocks=num_blocks, block_bytes=block_bytes, digest=digest)
    await moved(source, target, permuted(num_blocks, 5), permuted(num_blocks, 6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(4, 6), (4, 8), (6, 4)], ids=str)
async def test_fills_blocks_of_another_layout(workers: Cluster, sizes: tuple[int, int], dtype: str) -> None:
    """Where their bytes belong, whatever the byte path, also of blocks that are wanted in part."""
    theirs = cut(sizes[0])
    mine = cut(sizes[1], dtype)
    source = await workers.side("source", block_bytes=theirs.block_bytes)
    target = await workers.side("target", block_bytes=theirs.block_bytes)
    of_numbers(source.region)
    pool = random_region(40, mine.block_bytes, 5)
    expected = KvRegion(memoryview(bytearray(pool.view)), mine.block_bytes, 40)
    tokens, table, blocks = range(24, 99), permuted(40, 3), permuted(64, 4, 25)
    transcoder = Transcoder(theirs, mine)
    transcoder.move(source.region, blocks, expected, table, tokens)
    into = Incoming(transcoder, pool, table, tokens, Buffers())
    wanted = blocks[24 // sizes[0] : -(-99 // sizes[0])]
    pinned, to = source.pin("t", blocks), np.arange(len(wanted), dtype=np.int32)
    await target.channel.pull(Pull(pinned, wanted, to, timeout_s=TIMEOUT_S, into=into))
    await asyncio.to_thread(into.wait)
    assert pool.view.tobytes() == expected.view.tobytes()


def cut(block_size_tokens: int, dtype: str = "float32") -> KvLayout:
    """Rows of whole stripes in float32."""
    layout = KvLayout("m", dtype, block_size_tokens, 2, 2, 8, 0)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * layout.num_layers * block_size_tokens)


def of_numbers(region: KvRegion) -> None:
    """No NaN, whose bits some conversions keep and some do not."""
    numbers = np.frombuffer(region.view, np.float32)
    numbers[:] = np.random.default_rng(1).standard_normal(len(numbers))


async def test_one_connection_after_another(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    for seed in range(5):
        await moved(source, target, permuted(64, seed, 9), permuted(64, seed + 100, 9))


async def test_concurrent_pulls_of_two_sources_in_both_directions(workers: Cluster) -> None:
    one, two, three = [await workers.side(name) for name in ("one", "two", "three")]
    jobs = []
    for n, (source, target) in enumerate([(one, three), (two, three), (three, one), (one, two)]):
        pinned = source.pin(f"t{n}", ids(1, 4, 6, 7))
        # Sources serve 0..9, targets are filled from 10 on.
        to = ids(*range(10 + 8 * n, 14 + 8 * n))
        jobs.append((source, target, pinned, to))
    async with asyncio.TaskGroup() as group:
        for _, target, pinned, to in jobs:
            group.create_task(target.channel.pull(Pull(pinned, pinned.block_table, to, timeout_s=TIMEOUT_S)))
    for source, target, pinned, to in jobs:
        assert blocks_of(target.region, to) == blocks_of(source.region, pinned.block_table)


@pytest.mark.parametrize("block_bytes", [64, 512], ids=["tiny", "digested-natively"])
async def test_refuses_what_is_not_leased(workers: Cluster, block_bytes: int) -> None:
    source = await workers.side("source", ttl_s=30, block_bytes=block_bytes)
    target = await workers.side("target", block_bytes=block_bytes)
    source.pin("t", ids(1, 2), epoch=2)
    for wrong in [
        source.source("unknown", ids(1, 2), epoch=2),
        source.source("t", ids(1, 2), epoch=1),
        source.source("t", ids(1, 2), epoch=3),
        source.source("t", ids(1, 9), epoch=2),
    ]:
        with pytest.raises(LeaseExpired):
            await target.channel.pull(Pull(wrong, wrong.block_table, ids(0, 1), timeout_s=TIMEOUT_S))
    source.clock.advance(30)
    with pytest.raises(LeaseExpired):
        await target.channel.pull(Pull(source.source("t", ids(1, 2), 2), ids(1, 2), ids(0, 1), timeout_s=TIMEOUT_S))
    assert source.leases.expire() == 1
    # And goes on serving.
    await moved(source, target, ids(5), ids(6))


@pytest.mark.parametrize(
    "target_blocks", [ids(0), ids(0, 64), ids(-1, 0), ids(3, 3)], ids=["fewer", "beyond", "negative", "twice"]
)
async def test_checks_the_target_blocks(workers: Cluster, target_blocks: BlockIds) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    before = target.region.view.tobytes()
    pinned = source.pin("t", ids(1, 2))
    with pytest.raises(InvalidRequest):
        await target.channel.pull(Pull(pinned, ids(1, 2), target_blocks, timeout_s=TIMEOUT_S))
    assert target.region.view.tobytes() == before


async def test_blocks_of_another_size_do_not_fit(workers: Cluster) -> None:
    source, target = await workers.side("source", block_bytes=64), await workers.side("target", block_bytes=128)
    pinned = source.pin("t", ids(1, 2))
    with pytest.raises(LayoutMismatch):
        await target.channel.pull(Pull(pinned, ids(1, 2), ids(1, 2), timeout_s=TIMEOUT_S))


async def test_a_source_that_is_not_there_is_lost(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", ids(1, 2))
    await source.channel.close()
    del workers.sides["source"]
    with pytest.raises(PeerLost):
        await target.channel.pull(Pull(pinned, ids(1, 2), ids(1, 2), timeout_s=2.0))


async def test_a_closed_channel_pulls_no_more(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", ids(1, 2))
    await target.channel.close()
    await target.channel.close()
    with pytest.raises(Draining):
        await target.channel.pull(Pull(pinned, ids(1, 2), ids(1, 2), timeout_s=TIMEOUT_S))


@pytest.mark.parametrize("block_bytes", [64, 512], ids=["tiny", "digested-natively"])
async def test_corrupted_bytes_are_noticed(workers: Cluster, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [await workers.side(name, block_bytes=block_bytes) for name in ("source", "target")]
    source, target = sides
    if workers.backend == "tcp" or workers.variant == "inline":
        send = Wire.send

        def blocks_first(wire, head, pieces=None, tail=b"", taken=None):  # type: ignore[no-untyped-def]
            if taken is None:
                return send(wire, head, pieces, tail)
            send(wire, head, pieces, b"", taken)
            taken[8:] = bytes(8)
            return send(wire, bytes(tail))

        monkeypatch.setattr(Wire, "send", blocks_first)
    elif workers.backend == "gloo":
        real_pair, lies = TorchPair.send, lambda told: told[:8] + bytes(8)
        monkeypatch.setattr(TorchPair, "send", lambda *args, **how: lies(real_pair(*args, **how)))
    else:
        module = importlib.import_module(DIGESTS[workers.backend])
        real = module.block_digests

        def then_flip(region, block_ids):  # type: ignore[no-untyped-def]
            digests = real(region, block_ids)
            if workers.backend == "shm":  # copied by now, or not
                return digests[:8] + bytes(8)
            region.block(int(block_ids[1]))[7] ^= 1
            return digests

        monkeypatch.setattr(module, "block_digests", then_flip)
    pinned = source.pin("t", ids(1, 2))
    with pytest.raises(KvCorrupt, match=r"'t': block 9 ") as caught:
        await target.channel.pull(Pull(pinned, ids(1, 2), ids(8, 9), timeout_s=TIMEOUT_S))
    assert caught.value.metadata == {"transfer_id": "t", "block_id": "9"}
    monkeypatch.undo()
    source.leases.release("t", 1, committed=False)
    await moved(source, target, ids(1, 2), ids(8, 9))


async def test_without_digests_nobody_looks(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = await workers.side("source", digest=False), await workers.side("target", digest=False)
    """Neither end, wherever it takes digests."""
    for name, module in list(sys.modules.items()):
        for digests in ("digests", "block_digests", "segment_digest"):
            if name.startswith("sagellm_common.comm_backend") and hasattr(module, digests):
                monkeypatch.setattr(module, digests, lambda *_: pytest.fail("looked"))
    monkeypatch.setattr(DeviceStaging, "digests", lambda *_: pytest.fail("looked"))
    await moved(source, target, ids(1, 2), ids(8, 9))


@pytest.fixture
def gate(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """For sources over tcp (after the first group) and the others (before it)."""
    if workers.backend == "tcp":
        gate = Gate(socket_source.blocks, stop_at=1)
        monkeypatch.setattr(socket_source, "blocks", gate)
        return gate
    if workers.backend == "gloo":
        staging = DeviceStaging if workers.variant != "gloo" else HostStaging
        gate = Gate(staging.digests, stop_at=0)
        monkeypatch.setattr(staging, "digests", lambda *of: gate(*of))
        return gate
    module = importlib.import_module(DIGESTS[workers.backend])
    gate = Gate(module.block_digests, stop_at=0)
    monkeypatch.setattr(module, "block_digests", gate)
    return gate


threaded = pytest.mark.parametrize(
    "workers", ["tcp", "staged", "shm", "vm-read", "gloo", "nccl", "on-device", "mooncake"], indirect=True
)
"""The mock's source has no thread that could be stopped: it runs on the event loop."""

BIG = {"num_blocks": 16, "block_bytes": 1 << 20}


@threaded
@pytest.mark.parametrize("end", ["release", "expire", "close"])
async def test_a_lease_that_ends_meanwhile_frees_after_the_send(workers: Cluster, gate: Gate, end: str) -> None:
    source, target = await workers.side("source", **BIG), await workers.side("target", **BIG)
    pinned = source.pin("t", permuted(16, 1, 8))
    to = permuted(16, 2, 8)
    with gate.opening():
        pull = asyncio.create_task(target.channel.pull(Pull(pinned, pinned.block_table, to, timeout_s=TIMEOUT_S)))
        await in_thread(gate.reached)
        if end == "release":
            source.leases.release("t", 1, committed=False)
        elif end == "expire":
            source.clock.advance(1000)
            assert source.leases.expire() == 1
        else:
            source.leases.close()
        assert source.freed == []
        with pytest.raises(LeaseExpired):
            source.leases.renew("t", 1)
    await pull
    assert blocks_of(target.region, to) == blocks_of(source.region, pinned.block_table)
    await in_thread(source.watched.quiet)
    assert len(source.freed) == 1
    with pytest.raises(LeaseExpired):
        await target.channel.pull(Pull(pinned, pinned.block_table, to, timeout_s=TIMEOUT_S))


@threaded
async def test_nothing_is_written_after_a_cancellation(workers: Cluster, gate: Gate) -> None:
    source, target = await workers.side("source", **BIG), await workers.side("target", **BIG)
    pinned = source.pin("t", permuted(16, 1, 12))
    with gate.opening():
        pull = asyncio.create_task(
            target.channel.pull(Pull(pinned, pinned.block_table, permuted(16, 2, 12), timeout_s=TIMEOUT_S))
        )
        await in_thread(gate.reached)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        target.region.view[:] = bytes(len(target.region.view))
    await in_thread(source.watched.quiet)
    assert not any(target.region.view.tobytes())
    # The same two sides still understand each other.
    source.leases.release("t", 1, committed=False)
    await moved(source, target, permuted(16, 3, 8), permuted(16, 4, 8))


@threaded
async def test_a_silent_source_is_lost_at_the_deadline(workers: Cluster, gate: Gate) -> None:
    source, target = await workers.side("source", **BIG), await workers.side("target", **BIG)
    pinned = source.pin("t", permuted(16, 1, 12))
    with gate.opening():
        with pytest.raises(PeerLost):
            await target.channel.pull(Pull(pinned, pinned.block_table, permuted(16, 2, 12), timeout_s=0.3))
        target.region.view[:] = bytes(len(target.region.view))
    await in_thread(source.watched.quiet)
    assert not any(target.region.view.tobytes())


@pytest.mark.parametrize("workers", ["tcp", "shm"], indirect=True)
async def test_closing_ends_running_pulls(workers: Cluster, gate: Gate) -> None:
    # Over gloo a pull ends with its call.
    source, target = await workers.side("source", **BIG), await workers.side("target", **BIG)
    pinned = source.pin("t", permuted(16, 1, 12))
    with gate.opening():
        pull = asyncio.create_task(
            target.channel.pull(Pull(pinned, pinned.block_table, permuted(16, 2, 12), timeout_s=TIMEOUT_S))
        )
        await in_thread(gate.reached)
        await target.channel.close()
        with pytest.raises(PeerLost):
            await pull


# ---- the mock's own faults are the contract's errors ----


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        (Faults(drop_after_bytes=100), PeerLost),
        (Faults(stall_after_bytes=100), PeerLost),
        (Faults(corrupt_at_byte=100), KvCorrupt),
        *((Faults.seeded(seed, 128), (PeerLost, KvCorrupt)) for seed in range(8)),
    ],
)
async def test_mock_faults(faults: Faults, error: type[Exception] | tuple[type[Exception], ...]) -> None:
    workers = Cluster("mock")
    source, target = await workers.side("source"), await workers.side("target", faults=faults)
    pinned = source.pin("t", ids(1, 2))
    with pytest.raises(error):
        await target.channel.pull(Pull(pinned, ids(1, 2), ids(1, 2), timeout_s=0.1))
    assert source.watched.quiet.is_set()
    await workers.close()
