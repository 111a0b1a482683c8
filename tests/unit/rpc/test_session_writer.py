from __future__ import annotations

import asyncio

import pytest

from sagellm_common.core.errors import InvalidRequest, PeerLost
from sagellm_common.rpc.session_writer import SessionWriter
from tests.support.waiting import eventually

Ints = SessionWriter[list[int]]


class Peer:
    def __init__(self) -> None:
        self.messages: list[list[int]] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def write(self, message: list[int]) -> None:
        await self.reads.wait()
        self.messages.append(message)


async def test_what_waits_leaves_in_one_message() -> None:
    peer = Peer()
    writer = Ints(list, peer.write)
    async with writer.serving() as running:

        async def step(first: int) -> None:
            for item in range(first, first + 3):
                writer.message.append(item)

        await running.create_task(step(0))
        await eventually(lambda: bool(peer.messages))
        peer.reads.clear()
        writer.message.append(3)
        for _ in range(3):
            await asyncio.sleep(0)
        writer.message.append(4)
        writer.message.append(5)
        peer.reads.set()
    assert peer.messages == [[0, 1, 2], [3], [4, 5]]


async def test_leaving_waits_for_the_requests_and_sends_everything() -> None:
    peer = Peer()
    writer = Ints(list, peer.write)

    async def late() -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        writer.message.append(7)

    async with writer.serving() as running:
        running.create_task(late())
    assert peer.messages == [[7]]


async def test_a_peer_that_does_not_read_ends_the_session() -> None:
    peer = Peer()
    peer.reads.clear()
    writer = Ints(list, peer.write, stall_timeout_s=0.02)
    ended: list[str] = []

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    with pytest.raises(PeerLost, match="read nothing"):
        async with asyncio.timeout(5), writer.serving() as running:
            running.create_task(request())
            writer.message.append(1)
            await asyncio.Event().wait()
    assert ended == ["cancelled"]


async def test_an_error_of_the_block_is_raised_as_it_is() -> None:
    with pytest.raises(InvalidRequest, match="bad"):
        async with Ints(list, Peer().write).serving():
            raise InvalidRequest("bad")


async def test_cancelling_the_session_cancels_its_requests() -> None:
    ended: list[str] = []
    entered = asyncio.Event()

    async def request() -> None:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def session() -> None:
        async with Ints(list, Peer().write).serving() as running:
            running.create_task(request())
            await asyncio.Event().wait()

    task = asyncio.create_task(session())
    await entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert ended == ["cancelled"]


class Direct(Peer):
    """A peer that is written to without waiting while it reads."""

    def write_now(self, message: list[int]) -> bool:
        if self.reads.is_set():
            self.messages.append(message)
        return self.reads.is_set()


async def test_a_peer_that_keeps_up_is_written_to_in_the_same_turn() -> None:
    peer = Direct()
    writer = Ints.of(list, peer)
    async with writer.serving():
        writer.message.append(1)
        writer.message.append(2)
        assert not peer.messages
        await asyncio.sleep(0)
        assert peer.messages == [[1, 2]]
        writer.message.append(3)
        writer.flush()
        writer.message.append(4)
        assert peer.messages == [[1, 2], [3]]
    assert peer.messages == [[1, 2], [3], [4]]


async def test_nothing_overtakes_what_waits_for_the_peer() -> None:
    peer = Direct()
    writer = Ints.of(list, peer)
    async with writer.serving():
        peer.reads.clear()
        writer.message.append(1)
        for _ in range(3):
            await asyncio.sleep(0)
        writer.message.append(2)
        peer.reads.set()  # the first is still on its way through `write`
        writer.flush()
        writer.message.append(3)
        await eventually(lambda: len(peer.messages) == 2)
    assert peer.messages == [[1], [2, 3]]
