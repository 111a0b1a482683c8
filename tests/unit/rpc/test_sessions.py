"""The router's end of a session stream: multiplexing, failures, deadlines, cancellation, flow control."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from sagellm_common.core.errors import Cancelled, DeadlineExceeded, KvExhausted, PeerLost
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import GenerationRequest, SamplingParams, as_token_ids
from sagellm_common.rpc import session_client
from sagellm_common.rpc.carriers import Carrier, Choice, Deliver
from sagellm_common.rpc.channels import ChannelPool, stream
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.sessions import DecodeSession
from tests.support.router_harness import PROMPT
from tests.support.scripted_workers import ScriptedDecode, oracle
from tests.support.waiting import eventually

SAMPLING = SamplingParams(max_new_tokens=5)
TIMEOUT_S = 10.0


def request(request_id: str = "r", prompt: list[int] = PROMPT) -> GenerationRequest:
    return GenerationRequest(request_id, "scripted", as_token_ids(prompt), SAMPLING)


async def decoded(session: DecodeSession, asked: GenerationRequest, attempt: int = 1) -> list[int]:
    tokens: list[int] = []
    async with aclosing(session.decode(asked, attempt, [], None, timeout_s=TIMEOUT_S)) as steps:
        async for step in steps:
            assert step.index == len(tokens)
            tokens += step.token_ids
    return tokens


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedDecode]:
    topology, worker = EmbeddedTopology(), ScriptedDecode()
    await worker.start(topology)
    yield worker
    await worker.stop()
    await topology.close()


@pytest.fixture(params=["framed", "grpc"])
def choice(request: pytest.FixtureRequest) -> Choice:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def session(worker: ScriptedDecode, choice: Choice) -> AsyncIterator[DecodeSession]:
    async with ChannelPool() as channels:
        address = worker.record.address
        session = DecodeSession(channels.get(address), worker.worker_id, address, choice)
        yield session
        await session.close()


async def test_many_requests_share_one_stream(session: DecodeSession, worker: ScriptedDecode, choice: Choice) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(50)]
    got = await asyncio.gather(*(decoded(session, request(f"r{i}", prompt)) for i, prompt in enumerate(prompts)))
    assert got == [oracle(prompt, SAMPLING) for prompt in prompts]
    assert worker.sessions_opened == 1
    assert session.carrier == choice


async def test_one_requests_error_is_its_own(session: DecodeSession, worker: ScriptedDecode) -> None:
    worker.on("reserve", worker.refuse(KvExhausted("no room", retry_after_s=0.5)))
    with pytest.raises(KvExhausted, match="no room") as caught:
        await session.reserve(request(), 1, timeout_s=TIMEOUT_S)
    assert caught.value.retry_after_s == 0.5
    ticket = await session.reserve(request(), 2, timeout_s=TIMEOUT_S)
    assert (ticket.worker_id, ticket.epoch) == ("decode-0", 2)
    assert worker.sessions_opened == 1


async def test_a_broken_stream_fails_all_that_wait_at_once_and_the_next_call_opens_another(
    session: DecodeSession, worker: ScriptedDecode
) -> None:
    worker.on("reserve", worker.hang, worker.hang, worker.break_stream)
    waiting = [asyncio.create_task(session.reserve(request(f"r{i}"), 1, timeout_s=TIMEOUT_S)) for i in range(3)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [PeerLost] * 3
    assert results[0].metadata["worker_id"] == "decode-0"  # type: ignore[union-attr]
    assert await decoded(session, request("again")) == oracle(PROMPT, SAMPLING)
    assert worker.sessions_opened == 2


async def test_tokens_that_arrived_before_the_stream_broke_are_delivered(
    session: DecodeSession, worker: ScriptedDecode
) -> None:
    worker.on("token:3", worker.break_stream)
    tokens: list[int] = []
    with pytest.raises(PeerLost):
        async with aclosing(session.decode(request(), 1, [], None, timeout_s=TIMEOUT_S)) as steps:
            async for step in steps:
                tokens += step.token_ids
                await eventually(lambda: worker.reached["token:3"].is_set())
    assert tokens == oracle(PROMPT, SAMPLING)[:3]


async def test_nobody_there_is_peer_lost(unused_tcp_port: int, choice: Choice) -> None:
    async with ChannelPool() as channels:
        address = f"127.0.0.1:{unused_tcp_port}"
        session = DecodeSession(channels.get(address), "ghost", address, choice)
        with pytest.raises(PeerLost, match="ghost"):
            await session.reserve(request(), 1, timeout_s=TIMEOUT_S)
        await session.close()


async def test_a_silent_worker_is_given_up_at_the_deadline(session: DecodeSession, worker: ScriptedDecode) -> None:
    worker.on("reserve", worker.hang)
    with pytest.raises(DeadlineExceeded, match="reserve of request r"):
        await session.reserve(request(), 1, timeout_s=0.05)
    worker.on("token:2", worker.hang)
    with pytest.raises(DeadlineExceeded):
        async with aclosing(session.decode(request("s"), 1, [], None, timeout_s=0.3)) as steps:
            async for _ in steps:
                pass


async def test_cancel_ends_the_wait_here_and_the_work_there(session: DecodeSession, worker: ScriptedDecode) -> None:
    worker.on("token:2", worker.hang)
    call = asyncio.create_task(decoded(session, request()))
    await eventually(lambda: worker.reached["token:2"].is_set())
    session.cancel("r", 1)
    with pytest.raises(Cancelled):
        await call
    await eventually(lambda: not worker.running and worker.cancelled == [("r", 1)])


async def test_release_reaches_the_worker(session: DecodeSession, worker: ScriptedDecode) -> None:
    await session.reserve(request(), 1, timeout_s=TIMEOUT_S)
    assert worker.reservations == {("r", 1)}
    session.release("r", 1)
    await eventually(lambda: not worker.reservations)


async def test_the_same_attempt_cannot_wait_twice(session: DecodeSession, worker: ScriptedDecode) -> None:
    worker.on("reserve", worker.hang)
    first = asyncio.create_task(session.reserve(request(), 1, timeout_s=TIMEOUT_S))
    await eventually(lambda: worker.reached["reserve"].is_set())
    with pytest.raises(ValueError, match="already waiting"):
        await session.reserve(request(), 1, timeout_s=TIMEOUT_S)
    session.release("r", 1)
    with pytest.raises(Cancelled):
        await first


async def test_close_fails_what_waits_and_leaves_no_task(worker: ScriptedDecode, choice: Choice) -> None:
    async with ChannelPool() as channels:
        session = DecodeSession(channels.get(worker.record.address), worker.worker_id, worker.record.address, choice)
        worker.on("reserve", worker.hang)
        call = asyncio.create_task(session.reserve(request(), 1, timeout_s=TIMEOUT_S))
        await eventually(lambda: worker.reached["reserve"].is_set())
        await session.close()
        await session.close()
        with pytest.raises(PeerLost):
            await call
        with pytest.raises(PeerLost):
            await session.reserve(request(), 2, timeout_s=TIMEOUT_S)
        session.cancel("r", 1)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("session")]


# ---- a peer that does not read ----


class Held:
    """A carrier that is as full as the test says."""

    name = "framed"

    def __init__(self) -> None:
        self.full = False
        self.sent: list[worker_pb2.DecodeSessionRequest] = []
        self.ended = asyncio.Event()
        self.on_room: Callable[[], None] = lambda: None

    async def open(self, deliver: Deliver, on_room: Callable[[], None]) -> Carrier:
        self.on_room = on_room
        return self

    def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self) -> None:
        await self.ended.wait()


@pytest.fixture
async def held(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[DecodeSession, Held]]:
    async with ChannelPool() as channels:
        session, carrier = DecodeSession(channels.get("127.0.0.1:1"), "held", "127.0.0.1:1"), Held()
        monkeypatch.setattr(session, "_open", carrier.open)
        yield session, carrier
        await session.close()


async def test_a_peer_that_does_not_read_holds_calls_back_until_their_deadline(
    held: tuple[DecodeSession, Held],
) -> None:
    session, carrier = held
    carrier.full = True
    waiting = [asyncio.create_task(session.reserve(request(f"r{i}"), 1, timeout_s=TIMEOUT_S)) for i in range(6)]
    await eventually(lambda: session.carrier)
    with pytest.raises(DeadlineExceeded, match="took no new requests"):
        await session.reserve(request("late"), 1, timeout_s=0.05)
    session.release("r0", 1)  # never waits
    carrier.ended.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [Cancelled] + [PeerLost] * 5


async def test_calls_wait_for_a_stream_that_takes_long_to_open(
    held: tuple[DecodeSession, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, carrier = held
    monkeypatch.setattr(session_client, "EARLY_MESSAGES", 2)
    reachable = asyncio.Event()

    async def open_late(deliver: Deliver, on_room: Callable[[], None]) -> Carrier:
        await reachable.wait()
        return await carrier.open(deliver, on_room)

    monkeypatch.setattr(session, "_open", open_late)
    waiting = [asyncio.create_task(session.reserve(request(f"r{i}"), 1, timeout_s=TIMEOUT_S)) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded, match="took no new requests"):
        await session.reserve(request("late"), 1, timeout_s=0.05)
    reachable.set()
    await eventually(lambda: len(carrier.sent) == 3)
    assert [message.reserve.request_id for message in carrier.sent] == ["r0", "r1", "r2"]
    carrier.ended.set()
    assert [type(r) for r in await asyncio.gather(*waiting, return_exceptions=True)] == [PeerLost] * 3


async def test_what_was_cancelled_while_it_waited_to_be_sent_is_never_sent(held: tuple[DecodeSession, Held]) -> None:
    session, carrier = held
    waiting = [asyncio.create_task(decoded(session, request(f"r{i}"))) for i in range(2)]
    await eventually(lambda: len(carrier.sent) == 2)
    carrier.full = True
    waiting.append(asyncio.create_task(decoded(session, request("r2"))))
    await asyncio.sleep(0)
    session.cancel("r2", 1)
    with pytest.raises(Cancelled):
        await waiting[2]
    carrier.full = False
    carrier.on_room()
    await session.close()
    assert [type(r) for r in await asyncio.gather(*waiting[:2], return_exceptions=True)] == [PeerLost] * 2
    sent = [message.decode.request_id for message in carrier.sent if message.HasField("decode")]
    assert sent == ["r0", "r1"]
    assert sum(message.HasField("cancel") for message in carrier.sent) == 1


async def test_a_stream_on_a_closed_channel_is_peer_lost() -> None:
    channels = ChannelPool()
    stub = worker_pb2_grpc.WorkerServiceStub(channels.get("127.0.0.1:1"))
    await channels.close()
    with pytest.raises(PeerLost):
        async with aclosing(stream(stub.WatchStatus, worker_pb2.WatchStatusRequest(), timeout_s=1.0)) as messages:
            await anext(messages)
