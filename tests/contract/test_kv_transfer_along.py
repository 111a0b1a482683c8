"""What a byte path does that can pull blocks while they are computed (`KVTransferChannel.pull_along`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from sagellm_common.comm_backend.bridge import Buffers, Incoming
from sagellm_common.comm_backend.kv_dtypes import KvDtype
from sagellm_common.comm_backend.protocol import PullAlong, TransferResult
from sagellm_common.comm_backend.transcode import Transcoder, with_dtype
from sagellm_common.core.errors import (
    EngineFailed,
    InvalidRequest,
    KvCorrupt,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    SageError,
)
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds, KvLayout, KvSource
from tests.support.kv_channels import Cluster, Side, blocks_of, random_region
from tests.support.waiting import eventually

TIMEOUT_S = 10.0
BLOCK_TOKENS = 4
TABLE = np.array([9, 3, 4, 5, 20, 1], dtype=np.int32)
TARGETS = np.array([30, 31, 2, 40, 7, 8], dtype=np.int32)
NUM_TOKENS = len(TABLE) * BLOCK_TOKENS - 1
LAYERS = 4
SOURCES = "sagellm_common.comm_backend.backends"
TAKES_DIGESTS = {"tcp": "tcp_source", "shm": "socket_source", "mooncake": "socket_source"}


@pytest.fixture(params=["tcp", "shm", "vm-read", "mooncake"])
async def workers(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    workers = Cluster(request.param)
    yield workers
    await workers.close()


@dataclass
class Computation:
    """A prompt that `source` computes into TABLE, and `target`'s pull of it."""

    source: Side
    target: Side
    progress: KvProgress
    pinned: KvSource
    first_block: int
    pull: asyncio.Task[TransferResult] = field(init=False)
    here: int = 0

    def count(self, num_bytes: int) -> None:
        self.here += num_bytes

    def begin(self) -> None:
        targets = TARGETS[self.first_block :]
        channel = self.target.channel
        self.pull = asyncio.create_task(
            channel.pull_along(
                PullAlong(self.pinned, self.first_block, targets, timeout_s=TIMEOUT_S, on_bytes=self.count)
            )
        )

    def compute(self, end: int, layers: int = LAYERS) -> None:
        """A chunk up to `end`, or the first layers of it."""
        self.progress.chunk_begins(end)
        for layer in range(layers):
            self.progress.layer_done(layer)
        if layers == LAYERS:
            self.progress.chunk_done()

    async def arrived(self, num_bytes: int) -> None:
        await eventually(lambda: self.here >= num_bytes or self.pull.done(), lambda: f"{self.here} of {num_bytes}")
        assert self.here == num_bytes


@contextlib.contextmanager
def computing(source: Side, target: Side, first_block: int = 0, cached: int = 0) -> Iterator[Computation]:
    progress = KvProgress(NUM_TOKENS, cached, BLOCK_TOKENS)
    with source.leases.computing("t", 1, Allocation(TABLE), progress):
        yield Computation(source, target, progress, source.source("t", TABLE), first_block)


@asynccontextmanager
async def sides(workers: Cluster, num_layers: int = LAYERS, **both: object) -> AsyncIterator[tuple[Side, Side]]:
    options = {"block_bytes": 64, "num_layers": num_layers, **both}
    yield await workers.side("source", **options), await workers.side("target", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no-digest"])
@pytest.mark.parametrize("num_layers", [LAYERS, 0], ids=["layers", "whole-blocks"])
@pytest.mark.parametrize("chunk", [4, 6, 100])
@pytest.mark.parametrize("first_block", [0, 3, 5])
async def test_brings_every_block(
    workers: Cluster, first_block: int, chunk: int, num_layers: int, digest: bool
) -> None:
    async with sides(workers, num_layers, digest=digest) as (source, target):
        before = bytearray(target.region.view)
        with computing(source, target, first_block) as it:
            it.begin()
            for end in range(chunk, NUM_TOKENS + chunk, chunk):
                it.compute(end)
            result = await it.pull
        wanted = TABLE[first_block:]
        assert (result.blocks, result.bytes, it.here) == (len(wanted), 64 * len(wanted), 64 * len(wanted))
        for from_block, to_block in zip(wanted.tolist(), TARGETS[first_block:].tolist(), strict=True):
            before[to_block * 64 : to_block * 64 + 64] = source.region.block(from_block)
        assert target.region.view.tobytes() == before
    await eventually(lambda: source.watched.quiet.is_set())


async def test_brings_what_is_ready_and_nothing_else(workers: Cluster) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target, cached=4) as it:
            it.begin()
            await it.arrived(64)  # one block was there before
            it.compute(12, layers=2)
            await it.arrived(64 + 2 * 32)  # two of four layers of two blocks
            layer = [slice(0, 8), slice(16, 40)]  # keys, then values, of two layers
            for from_block, to_block in ((3, 31), (4, 2)):
                ours, theirs = target.region.block(to_block), source.region.block(from_block)
                assert all(ours[part] == theirs[part] for part in layer)
                assert ours[8:16] != theirs[8:16], "came before it was ready"
            it.progress.chunk_done()
            await it.arrived(3 * 64)
            it.progress.complete()
            await it.pull
    assert blocks_of(target.region, TARGETS) == blocks_of(source.region, TABLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_fills_blocks_of_another_layout(workers: Cluster, dtype: str) -> None:
    """As they come, where their bytes belong, also of the last one, which is not full."""
    theirs = with_dtype(KvLayout("m", "float32", BLOCK_TOKENS, 2, 2, 8, 0), KvDtype("float32"))
    mine = with_dtype(replace(theirs, block_size_tokens=6), KvDtype(dtype))
    async with sides(workers, 0, block_bytes=theirs.block_bytes) as (source, target):
        numbers = np.frombuffer(source.region.view, np.float32)
        numbers[:] = np.random.default_rng(1).standard_normal(len(numbers))
        pool = random_region(8, mine.block_bytes, 5)
        expected = KvRegion(memoryview(bytearray(pool.view)), mine.block_bytes, 8)
        table, tokens = np.array([7, 0, 3, 5], dtype=np.int32), range(12, NUM_TOKENS)
        transcoder = Transcoder(theirs, mine)
        transcoder.move(source.region, TABLE, expected, table, tokens)
        into = Incoming(transcoder, pool, table, tokens, Buffers())
        with computing(source, target, first_block=3) as it:
            to = np.arange(3, dtype=np.int32)
            asked = PullAlong(it.pinned, 3, to, timeout_s=TIMEOUT_S, on_bytes=it.count, into=into)
            it.pull = asyncio.create_task(target.channel.pull_along(asked))
            it.compute(17)
            await it.arrived(theirs.block_bytes)
            it.progress.complete()
            await it.pull
        await asyncio.to_thread(into.wait)
        assert pool.view.tobytes() == expected.view.tobytes()


async def test_more_than_fits_a_group(workers: Cluster) -> None:
    async with sides(workers, transport={"chunk_bytes": 100}) as (source, target):
        with computing(source, target) as it:
            it.begin()
            it.compute(NUM_TOKENS, layers=3)
            it.progress.complete()
            await it.pull
        assert blocks_of(target.region, TARGETS) == blocks_of(source.region, TABLE)


async def test_a_source_that_computes_for_long_is_not_silent(workers: Cluster) -> None:
    """Longer than the receiver would wait for a silent one: it hears that there is nothing yet."""
    async with sides(workers, silence_s=0.3) as (source, target):
        with computing(source, target) as it:
            it.begin()
            done, _ = await asyncio.wait({it.pull}, timeout=0.9)
            assert not done
            it.progress.complete()
            await it.pull


async def test_the_end_of_the_computation_ends_the_pull(workers: Cluster) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target) as it:
            it.begin()
            it.compute(8)
            await it.arrived(2 * 64)
            it.progress.fail(EngineFailed("boom"))
            with pytest.raises(EngineFailed, match="boom"):
                await it.pull
        # The two still understand each other, over the same connection or another.
        with computing(source, target) as again:
            again.begin()
            again.progress.complete()
            await again.pull


async def test_a_lease_that_ends_stops_the_pull_before_the_next_segment(workers: Cluster) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target) as it:
            it.begin()
            it.compute(8)
            await it.arrived(2 * 64)
            source.leases.release("t", 1, committed=False)
            assert len(source.freed) == 1
            it.compute(NUM_TOKENS)
            with pytest.raises(LeaseExpired):
                await it.pull
            assert it.here == 2 * 64


async def test_a_cancelled_pull_writes_nothing_more(workers: Cluster) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target) as it:
            it.begin()
            it.compute(8)
            await it.arrived(2 * 64)
            it.pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await it.pull
            target.region.view[:] = bytes(len(target.region.view))
            it.progress.complete()
            await eventually(lambda: source.watched.quiet.is_set())
        assert not any(target.region.view.tobytes())


async def test_a_source_that_is_closed_is_lost(workers: Cluster) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target) as it:
            it.begin()
            it.compute(8)
            await it.arrived(2 * 64)
            await source.channel.close()
            it.progress.complete()
            with pytest.raises(PeerLost):
                await it.pull


async def test_corrupted_bytes_are_noticed(workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target) as it:
            it.begin()
            it.compute(8)
            await it.arrived(2 * 64)
            monkeypatch.setattr(f"{SOURCES}.{TAKES_DIGESTS[workers.backend]}.segment_digest", lambda views: bytes(8))
            it.compute(16, layers=1)
            with pytest.raises(KvCorrupt, match=r"'t': layers 0\.\.0 of blocks 2\.\.3"):
                await it.pull


def wrong_first_block(it: Computation) -> None:
    it.first_block = 7


def wrong_epoch(it: Computation) -> None:
    it.pinned = it.source.source("t", TABLE, epoch=2)


def never_announced(it: Computation) -> None:
    it.pinned = it.source.pin("other", np.array([50], dtype=np.int32))


@pytest.mark.parametrize(
    ("mistake", "error"),
    [(wrong_first_block, InvalidRequest), (wrong_epoch, LeaseExpired), (never_announced, LeaseExpired)],
)
async def test_refuses(workers: Cluster, mistake: object, error: type[SageError]) -> None:
    async with sides(workers) as (source, target):
        with computing(source, target) as it:
            mistake(it)  # type: ignore[operator]
            targets: BlockIds = TARGETS[:1]
            with pytest.raises(error):
                await target.channel.pull_along(
                    PullAlong(it.pinned, it.first_block, targets, timeout_s=TIMEOUT_S, on_bytes=it.count)
                )


async def test_another_block_size_does_not_fit(workers: Cluster) -> None:
    source = await workers.side("source", num_layers=LAYERS, block_bytes=128)
    target = await workers.side("target", num_layers=LAYERS)
    with computing(source, target) as it:
        it.begin()
        with pytest.raises(LayoutMismatch):
            await it.pull


@pytest.mark.parametrize("layers", [(LAYERS, 0), (0, LAYERS), (LAYERS, 2)])
async def test_where_only_one_side_tells_layers_apart_blocks_come_whole(
    workers: Cluster, layers: tuple[int, int]
) -> None:
    source = await workers.side("source", num_layers=layers[0])
    target = await workers.side("target", num_layers=layers[1])
    with computing(source, target) as it:
        it.begin()
        it.compute(8, layers=3)
        it.compute(12)
        await it.arrived(3 * 64)
        it.progress.complete()
        await it.pull
    assert blocks_of(target.region, TARGETS) == blocks_of(source.region, TABLE)


@pytest.mark.parametrize("backend", ["staged", "mock"])
async def test_some_send_and_take_whole_blocks_only(backend: str) -> None:
    workers = Cluster(backend)
    source, target = await workers.side("source"), await workers.side("target")
    with computing(source, target) as it:
        it.begin()
        it.compute(8)
        await it.arrived(2 * 64)
        it.progress.complete()
        await it.pull
    assert blocks_of(target.region, TARGETS) == blocks_of(source.region, TABLE)
    await workers.close()


@pytest.mark.parametrize("backend", ["gloo", "on-device"])
async def test_others_say_that_they_cannot(backend: str) -> None:
    workers = Cluster(backend)
    source, target = await workers.side("source"), await workers.side("target")
    assert not target.channel.pulls_along
    with pytest.raises(InvalidRequest, match="over gloo"):
        await target.channel.pull_along(
            PullAlong(source.source("t", TABLE), 0, TARGETS, timeout_s=TIMEOUT_S, on_bytes=lambda _: None)
        )
    await workers.close()
