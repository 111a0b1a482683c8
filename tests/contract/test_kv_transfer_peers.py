"""What a byte path makes of peers that are cut off at any byte, are slow, are somebody else, or ask for too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from sagellm_common.comm_backend.backends.mock import Faults
from sagellm_common.comm_backend.protocol import KVTransferChannel, Pull, PullAlong, TransferResult
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.core.errors import KvCorrupt, LeaseExpired, PeerLost, QueueFull
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import KvSource
from tests.support.cut_proxy import cut_proxy
from tests.support.kv_channels import BACKENDS, HOST, Cluster, Side, blocks_of
from tests.support.waiting import eventually

TIMEOUT_S = 10.0
FROM = np.array([5, 2, 3], dtype=np.int32)
TO = np.array([1, 7, 6], dtype=np.int32)
IN_BAND = ("tcp", "staged", "mooncake")
"""Those whose receiver asks on a connection of its own to the data address. Over gloo it asks by RPC: the death of a
whole process is in test_kv_transfer_peer_death."""


@pytest.fixture(params=BACKENDS)
async def workers(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    workers = Cluster(request.param)
    yield workers
    await workers.close()


in_band = pytest.mark.parametrize("workers", IN_BAND, indirect=True)


async def pulled(source: KvSource, target: Side, timeout_s: float = TIMEOUT_S) -> TransferResult:
    return await target.channel.pull(Pull(source, FROM, TO, timeout_s=timeout_s))


def untouched_beside(before: bytes, target: Side) -> bool:
    size = target.region.block_bytes
    now = target.region.view.tobytes()
    outside = set(range(target.region.num_blocks)) - set(TO.tolist())
    return all(now[b * size : (b + 1) * size] == before[b * size : (b + 1) * size] for b in outside)


@in_band
async def test_a_connection_cut_at_any_byte_is_a_lost_peer(workers: Cluster) -> None:
    source, target = await workers.side("source", block_bytes=8), await workers.side("target", block_bytes=8)
    pinned = source.pin("t", FROM)
    async with cut_proxy(source.channel.address) as proxy:
        await pulled(replace(pinned, data_address=proxy.address), target)
        total = proxy.forwarded
    assert blocks_of(target.region, TO) == blocks_of(source.region, FROM)
    assert total > 40
    before = target.region.view.tobytes()
    for cut in range(total):
        async with cut_proxy(source.channel.address, cut) as proxy:
            with pytest.raises(PeerLost):
                await pulled(replace(pinned, data_address=proxy.address), target)
    assert untouched_beside(before, target)
    target.region.view[:] = bytes(len(target.region.view))
    await pulled(pinned, target)
    assert blocks_of(target.region, TO) == blocks_of(source.region, FROM)
    assert await asyncio.to_thread(source.watched.quiet.wait, 10)


async def test_the_mock_dies_at_any_byte() -> None:
    workers = Cluster("mock")
    source, target = await workers.side("source", block_bytes=8), await workers.side("target", block_bytes=8)
    pinned = source.pin("t", FROM)
    for cut in range(24):
        target.channel.faults = Faults(drop_after_bytes=cut)  # type: ignore[attr-defined]
        with pytest.raises(PeerLost):
            await pulled(pinned, target)
    await workers.close()


@in_band
async def test_a_source_that_trickles_is_waited_for(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", FROM)
    async with cut_proxy(source.channel.address) as proxy:
        proxy.chunk = 1
        await pulled(replace(pinned, data_address=proxy.address), target)
    assert blocks_of(target.region, TO) == blocks_of(source.region, FROM)


@in_band
@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, bytes(4096)], ids=["hangs-up", "http", "zeros"]
)
async def test_somebody_else_at_the_address_is_a_lost_peer(workers: Cluster, says: bytes) -> None:
    source, target = await workers.side("source"), await workers.side("target")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        writer.close()

    async with await asyncio.start_server(answer, HOST, 0) as server:
        address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(PeerLost):
            await pulled(replace(source.pin("t", FROM), data_address=address), target)


async def test_a_source_that_was_restarted_has_no_such_lease(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", FROM)
    await source.channel.close()
    again = await workers.side("source")
    for known_as in ("source-1", "source-2"):
        moved = replace(pinned, data_address=again.channel.address, incarnation=known_as)
        with pytest.raises(LeaseExpired):
            await pulled(moved, target)
    await pulled(again.pin("t", FROM), target)
    assert blocks_of(target.region, TO) == blocks_of(again.region, FROM)


class Held:
    """A channel whose pulls begin when they are let go: however short they are, they are under way together."""

    def __init__(self, channel: KVTransferChannel) -> None:
        self._channel = channel
        self.name, self.pulls_along, self.encodes = channel.name, channel.pulls_along, channel.encodes
        self.let_go = asyncio.Event()
        self.most = 0
        self._now = 0

    async def pull(self, asked: Pull) -> TransferResult:
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await self.let_go.wait()
            return await self._channel.pull(asked)
        finally:
            self._now -= 1


async def test_many_pulls_take_turns(workers: Cluster) -> None:
    """Three at a time, twelve may wait, and the rest is turned away: the least urgent ones."""
    source, target = await workers.side("source", num_blocks=64), await workers.side("target", num_blocks=64)
    held = Held(target.channel)
    queue = PullQueue(held, 3, 12)  # type: ignore[arg-type]
    pinned = [source.pin(f"t{n}", np.array([n, n + 20], dtype=np.int32)) for n in range(20)]
    to = [np.array([3 * n, 3 * n + 1], dtype=np.int32) for n in range(20)]
    pulls = [
        asyncio.create_task(
            queue.pull(Pull(pinned[n], pinned[n].block_table, to[n], timeout_s=TIMEOUT_S, priority=n % 2))
        )
        for n in range(20)
    ]
    await eventually(lambda: sum(pull.done() for pull in pulls) == 5, lambda: "nobody was turned away")
    held.let_go.set()
    outcomes = await asyncio.gather(*pulls, return_exceptions=True)
    refused = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, QueueFull)]
    assert len(refused) == 5 and all(n % 2 == 0 for n in refused)
    assert held.most == 3
    for n in set(range(20)) - set(refused):
        assert isinstance(outcomes[n], TransferResult), outcomes[n]
        assert blocks_of(target.region, to[n]) == blocks_of(source.region, pinned[n].block_table)


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        (Faults(), None),
        (Faults(drop_after_bytes=64), PeerLost),
        (Faults(stall_after_bytes=130), PeerLost),
        (Faults(corrupt_at_byte=191), KvCorrupt),
    ],
)
async def test_the_mock_pulls_along_with_the_same_faults(faults: Faults, error: type[Exception] | None) -> None:
    workers = Cluster("mock")
    source, target = await workers.side("source"), await workers.side("target", faults=faults)
    progress = KvProgress(12, 0, 4)
    with source.leases.computing("t", 1, Allocation(FROM), progress):
        pull = asyncio.create_task(
            target.channel.pull_along(
                PullAlong(source.source("t", FROM), 0, TO, timeout_s=0.5, on_bytes=lambda _: None)
            )
        )
        progress.chunk_begins(8)
        progress.chunk_done()
        await asyncio.wait([pull], timeout=0.05)
        assert error is PeerLost or not pull.done()
        progress.complete()
        (outcome,) = await asyncio.gather(pull, return_exceptions=True)
    if error is None:
        assert blocks_of(target.region, TO) == blocks_of(source.region, FROM)
    else:
        assert isinstance(outcome, error), outcome
    assert source.watched.quiet.is_set()
    await workers.close()


async def test_pulls_of_a_mock_that_fails_at_random_are_right_or_errors() -> None:
    workers = Cluster("mock")
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", FROM)
    seen = set()
    for seed in range(40):
        target.channel.faults = Faults.seeded(seed, 3 * 64)  # type: ignore[attr-defined]
        with pytest.raises((PeerLost, KvCorrupt)) as caught:
            await pulled(pinned, target, timeout_s=0.02)
        seen.add(type(caught.value))
    assert seen == {PeerLost, KvCorrupt}
    await workers.close()
