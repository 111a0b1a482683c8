"""Which carrier a session gets, what it says when it is not the one wanted, and how each tells of a slow peer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from sagellm_common.core.errors import InvalidRequest, PeerLost, SageError
from sagellm_common.rpc import carriers, server
from sagellm_common.rpc.carriers import FramedCarrier, GrpcCarrier, Opener
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.framed import FramedConnection, Kind
from sagellm_common.rpc.framed_server import FramedServer
from sagellm_common.rpc.gen.sagellm.v1 import session_pb2, worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.server import GrpcServer, Registrar
from tests.support.waiting import eventually

SERVICE = "sagellm.v1.DecodeService"


class Decode(worker_pb2_grpc.DecodeServiceServicer):
    async def Session(self, requests: AsyncIterator[Any], context: Any) -> None:
        async for message in requests:
            output = worker_pb2.DecodeResponse(request_id=message.cancel.request_id)
            await context.write(worker_pb2.DecodeSessionResponse(outputs=[output]))


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    async with ChannelPool() as channels:
        yield channels


async def opened(
    channels: ChannelPool, choice: carriers.Choice, *, session_port: int | None = 0
) -> tuple[GrpcServer, str]:
    """A server, and what carried a message to it and its answer back."""
    registrar = Registrar(SERVICE, worker_pb2_grpc.add_DecodeServiceServicer_to_server, Decode())
    running = GrpcServer("127.0.0.1:0", [registrar], session_port=session_port)
    address = f"127.0.0.1:{await running.start()}"
    answers: asyncio.Queue[Any] = asyncio.Queue()
    try:
        carrier = await Opener(channels.get(address), address, SERVICE, choice).open(answers.put_nowait, lambda: None)
        life = asyncio.create_task(carrier.run())
        carrier.send(worker_pb2.DecodeSessionRequest(cancel=worker_pb2.CancelRequest(request_id="r")))
        assert (await answers.get()).outputs[0].request_id == "r"
        life.cancel()
        await asyncio.wait([life])
    finally:
        await running.stop(0)
    return running, carrier.name


@pytest.mark.parametrize(
    ("choice", "session_port", "expected"),
    [
        ("auto", 0, "framed"),
        ("framed", 0, "framed"),
        ("grpc", 0, "grpc"),
        ("auto", None, "grpc"),
        ("grpc", None, "grpc"),
    ],
)
async def test_the_carrier_is_the_one_wanted_or_the_one_there_is(
    channels: ChannelPool, choice: carriers.Choice, session_port: int | None, expected: str
) -> None:
    _, name = await opened(channels, choice, session_port=session_port)
    assert name == expected


WRONG: dict[str, tuple[Callable[[FramedServer, int], session_pb2.LocateSessionResponse], str]] = {
    "another life's token": (
        lambda here, _: session_pb2.LocateSessionResponse(port=here._port, token="old"),
        "not of this server's life",
    ),
    "a port nobody listens on": (
        lambda _, unused: session_pb2.LocateSessionResponse(port=unused, token="any"),
        "cannot be reached",
    ),
}


@pytest.mark.parametrize("what", [*WRONG, "an older server"])
async def test_a_framed_session_that_cannot_be_had_is_said_and_grpc_carries_instead(
    channels: ChannelPool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unused_tcp_port: int,
    what: str,
) -> None:
    if what in WRONG:
        locate, reason = WRONG[what]
        monkeypatch.setattr(FramedServer, "location", property(lambda here: locate(here, unused_tcp_port)))
    else:
        monkeypatch.setattr(server.session_pb2_grpc, "add_SessionServiceServicer_to_server", lambda *_: None)
        reason = "it does not know of them"
    with caplog.at_level(logging.WARNING):
        _, name = await opened(channels, "auto")
    assert name == "grpc"
    assert "gRPC is used instead" in caplog.text
    assert reason in caplog.text
    with pytest.raises(PeerLost, match=reason):
        await opened(channels, "framed")


async def test_nobody_there_is_peer_lost_and_not_a_reason_for_grpc(channels: ChannelPool, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    with pytest.raises(PeerLost):
        await Opener(channels.get(address), address, SERVICE, "auto").open(lambda _: None, lambda: None)


# ---- a peer that does not read ----


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = socket.create_connection(listening.getsockname())
        return here, listening.accept()[0]


def message(i: int) -> worker_pb2.DecodeSessionRequest:
    cancel = worker_pb2.CancelRequest(request_id="x" * (1 << 18), attempt=i)
    return worker_pb2.DecodeSessionRequest(cancel=cancel)


class DeafCall:
    """A gRPC call whose peer reads once `readable` is set."""

    def __init__(self) -> None:
        self.readable = asyncio.Event()
        self.received: list[int] = []

    def __aiter__(self) -> DeafCall:
        return self

    async def __anext__(self) -> Any:
        await asyncio.Event().wait()

    async def write(self, message: worker_pb2.DecodeSessionRequest) -> None:
        await self.readable.wait()
        self.received.append(message.cancel.attempt)

    def cancel(self) -> None: ...


async def test_a_grpc_stream_is_full_while_its_peer_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "OUTBOX_MESSAGES", 3)
    call, room = DeafCall(), asyncio.Event()
    carrier = GrpcCarrier(call, lambda _: None, room.set)
    life = asyncio.create_task(carrier.run())
    for i in range(10):
        carrier.send(message(i))
    await asyncio.sleep(0)
    assert carrier.full
    room.clear()
    call.readable.set()
    await eventually(lambda: call.received == list(range(10)))
    assert room.is_set()
    assert not carrier.full
    life.cancel()
    await asyncio.wait([life])


async def test_a_framed_connection_is_full_while_its_peer_reads_nothing() -> None:
    here, there = tcp_pair()
    loop, room, received = asyncio.get_running_loop(), asyncio.Event(), list[int]()

    def take(kind: Kind, payload: bytes) -> None:
        if kind is Kind.MESSAGE:
            received.append(worker_pb2.DecodeSessionRequest.FromString(payload).cancel.attempt)

    _, peer = await loop.create_connection(lambda: FramedConnection(take), sock=there)
    peer.greeted(take)
    peer.pause_reading()
    _, connection = await loop.create_connection(lambda: FramedConnection(take, room.set), sock=here)
    carrier = FramedCarrier(connection, worker_pb2.DecodeSessionResponse, lambda _: None)
    life = asyncio.create_task(carrier.run())
    for i in range(40):
        carrier.send(message(i))
    assert carrier.full
    room.clear()
    peer.resume_reading()
    await eventually(lambda: received == list(range(40)))
    assert room.is_set()
    assert not carrier.full
    life.cancel()
    await asyncio.gather(life, return_exceptions=True)
    await peer.lost


async def test_a_message_that_is_too_long_is_its_senders_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "MAX_MESSAGE_BYTES", 1000)
    here, there = tcp_pair()
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: FramedConnection(lambda *_: None), sock=here)
    carrier = FramedCarrier(connection, worker_pb2.DecodeSessionResponse, lambda _: None)
    with pytest.raises(InvalidRequest, match="at most 1000"):
        carrier.send(message(0))
    assert not connection.ended
    there.close()
    with pytest.raises(PeerLost):
        await carrier.run()


async def test_why_a_framed_session_ended_is_told() -> None:
    here, there = tcp_pair()
    loop = asyncio.get_running_loop()
    _, peer = await loop.create_connection(lambda: FramedConnection(lambda *_: None), sock=there)
    _, connection = await loop.create_connection(lambda: FramedConnection(lambda *_: None), sock=here)
    carrier = FramedCarrier(connection, worker_pb2.DecodeSessionResponse, lambda _: None)
    peer.end(SageError("the reason"))
    with pytest.raises(SageError, match="the reason"):
        await carrier.run()
    await peer.lost
