"""Framed sessions on the wire: what is taken, what is refused, and how a peer's silence ends."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
from google.rpc import status_pb2

from sagellm_common.core.errors import InvalidRequest, PeerLost, SageError
from sagellm_common.rpc import framed, framed_server
from sagellm_common.rpc.framed import FramedConnection, Kind
from sagellm_common.rpc.framed_server import FramedServer, session_methods
from sagellm_common.rpc.gen.sagellm.v1 import session_pb2, worker_pb2
from sagellm_common.rpc.session_writer import SessionWriter
from sagellm_common.rpc.status import from_status
from tests.support.waiting import TIMEOUT_S, eventually

SERVICE = "sagellm.v1.DecodeService"
HOST = "127.0.0.1"


class Echo:
    """Answers every cancel with an output of its request_id; `stop` and the like are scripted by it."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.stalled = asyncio.Event()

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> None:
        how = "cancelled"
        try:
            async for message in requests:
                request_id = message.cancel.request_id
                if request_id == "refuse":
                    raise InvalidRequest("this one not")
                if request_id == "crash":
                    raise RuntimeError("secret")
                if request_id == "flood":
                    await self._flood(context)
                if request_id == "hold":
                    self.stalled.set()
                    await asyncio.Event().wait()
                output = worker_pb2.DecodeResponse(request_id=request_id)
                await context.write(worker_pb2.DecodeSessionResponse(outputs=[output]))
            how = "done"
        finally:
            self.ended.append(how)

    async def _flood(self, context: Any) -> None:
        """Writes until the peer does not read, as a session's writer does."""
        writer = SessionWriter(worker_pb2.DecodeSessionResponse, context.write, stall_timeout_s=0.1)
        async with writer.serving():
            while True:
                writer.message.outputs.add(token_ids=b"x" * (1 << 20))
                await asyncio.sleep(0)


@dataclass(slots=True)
class Peer:
    """The other end, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.writer.write(struct.pack("!IB", len(payload), kind) + payload)

    def ask(self, request_id: str) -> None:
        cancel = worker_pb2.CancelRequest(request_id=request_id)
        self.send(Kind.MESSAGE, worker_pb2.DecodeSessionRequest(cancel=cancel).SerializeToString())

    async def frame(self) -> tuple[Kind, bytes]:
        async with asyncio.timeout(TIMEOUT_S):
            length, kind = struct.unpack("!IB", await self.reader.readexactly(5))
            return Kind(kind), await self.reader.readexactly(length)

    async def answer(self) -> str:
        kind, payload = await self.frame()
        assert kind is Kind.MESSAGE
        return worker_pb2.DecodeSessionResponse.FromString(payload).outputs[0].request_id

    async def refusal(self) -> SageError:
        """The error that ends the connection."""
        kind, payload = await self.frame()
        assert kind is Kind.END
        async with asyncio.timeout(TIMEOUT_S):
            assert await self.reader.read() == b""
        return from_status(status_pb2.Status.FromString(payload))


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo) -> AsyncIterator[FramedServer]:
    server = FramedServer(session_methods({SERVICE: echo}))
    await server.start(HOST, 0)
    yield server
    await server.stop(0)


@asynccontextmanager
async def peer_of(server: FramedServer, hello: session_pb2.SessionHello | None = None) -> AsyncIterator[Peer]:
    """Greeted, unless it is to say another hello."""
    reader, writer = await asyncio.open_connection(HOST, server.location.port)
    peer = Peer(reader, writer)
    try:
        if hello is None:
            hello = session_pb2.SessionHello(service=SERVICE, token=server.location.token)
            peer.send(Kind.HELLO, hello.SerializeToString())
            assert await peer.frame() == (Kind.HELLO, b"")
        else:
            peer.send(Kind.HELLO, hello.SerializeToString())
        yield peer
    finally:
        writer.transport.abort()


async def test_messages_go_both_ways_and_end_ends_the_session(server: FramedServer, echo: Echo) -> None:
    async with peer_of(server) as peer:
        for i in range(3):
            peer.ask(f"r{i}")
        assert [await peer.answer() for _ in range(3)] == ["r0", "r1", "r2"]
        peer.send(Kind.END)
        assert await peer.frame() == (Kind.END, b"")
        assert echo.ended == ["done"]


async def test_frames_may_come_in_any_pieces(server: FramedServer) -> None:
    ids = ["a", "b" * 300, "c" * (3 << 20)]
    async with peer_of(server) as peer:
        cancels = [worker_pb2.CancelRequest(request_id=request_id) for request_id in ids]
        messages = [worker_pb2.DecodeSessionRequest(cancel=cancel).SerializeToString() for cancel in cancels]
        stream = b"".join(struct.pack("!IB", len(m), Kind.MESSAGE) + m for m in messages)
        cuts = [0, 1, 4, 5, 6, 7, 11, 12, 40, 333, 1 << 20, len(stream)]
        for begin, end in itertools.pairwise(cuts):
            peer.writer.write(stream[begin:end])
            await peer.writer.drain()
        assert [await peer.answer() for _ in ids] == ids


REFUSED: dict[str, tuple[Callable[[Peer], Any], str]] = {
    "too long": (lambda p: p.writer.write(struct.pack("!IB", 65 << 20, Kind.MESSAGE)), "67108864 are taken"),
    "no such kind": (lambda p: p.send(9), "a frame of kind 9; kinds are 1 HELLO"),
    "no protobuf": (lambda p: p.send(Kind.MESSAGE, b"\xff\xff\xff"), "3 bytes of a frame of kind 2 are malformed"),
    "hello again": (lambda p: p.send(Kind.HELLO), "a second HELLO"),
    "by the servicer": (lambda p: p.ask("refuse"), "this one not"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_malformed_ends_this_connection_alone(server: FramedServer, echo: Echo, what: str) -> None:
    act, message = REFUSED[what]
    async with peer_of(server) as other, peer_of(server) as peer:
        act(peer)
        error = await peer.refusal()
        assert isinstance(error, InvalidRequest)
        assert message in error.message
        await eventually(lambda: len(echo.ended) == 1)
        other.ask("fine")
        assert await other.answer() == "fine"


async def test_nothing_of_an_unexpected_error_is_told(server: FramedServer) -> None:
    async with peer_of(server) as peer:
        peer.ask("crash")
        error = await peer.refusal()
        assert error.reason == "INTERNAL"
        assert "secret" not in error.message


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (session_pb2.SessionHello(service=SERVICE, token="of an earlier life"), "not of this server's life"),
        (session_pb2.SessionHello(service="sagellm.v1.KvStoreService"), "no sessions of 'sagellm.v1.KvStoreService'"),
    ],
    ids=["token", "service"],
)
async def test_who_does_not_know_where_it_is_is_turned_away(
    server: FramedServer, echo: Echo, hello: session_pb2.SessionHello, message: str
) -> None:
    if not hello.token:
        hello.token = server.location.token
    async with peer_of(server, hello) as peer:
        assert message in (await peer.refusal()).message
        assert not echo.ended


async def test_a_message_before_hello_is_refused(server: FramedServer) -> None:
    reader, writer = await asyncio.open_connection(HOST, server.location.port)
    peer = Peer(reader, writer)
    peer.ask("r")
    assert "the first frame is a MESSAGE" in (await peer.refusal()).message
    writer.close()


async def test_a_stranger_may_send_only_little(server: FramedServer) -> None:
    reader, writer = await asyncio.open_connection(HOST, server.location.port)
    peer = Peer(reader, writer)
    peer.writer.write(struct.pack("!IB", 5000, Kind.HELLO))
    assert "a frame of 5000 bytes; at most 4096" in (await peer.refusal()).message
    writer.close()


async def test_who_says_nothing_is_turned_away(server: FramedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed_server, "HELLO_TIMEOUT_S", 0.02)
    reader, writer = await asyncio.open_connection(HOST, server.location.port)
    assert "no HELLO within" in (await Peer(reader, writer).refusal()).message
    writer.close()


async def test_a_ping_is_answered(server: FramedServer) -> None:
    async with peer_of(server) as peer:
        peer.send(Kind.PING)
        assert await peer.frame() == (Kind.PONG, b"")


async def test_the_session_of_a_silent_peer_is_cancelled(
    server: FramedServer, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed, "KEEPALIVE_S", 0.02)
    monkeypatch.setattr(framed, "KEEPALIVE_TIMEOUT_S", 0.02)
    async with peer_of(server):
        await eventually(lambda: echo.ended == ["cancelled"])


@dataclass(slots=True)
class Pulse:
    """A connection on a clock of its own, whose timer is called by hand."""

    clock: Mock
    transport: Mock
    connection: FramedConnection

    @property
    def due_s(self) -> float:
        return self.clock.call_at.call_args.args[0]

    def beat(self, at_s: float) -> list[Kind]:
        """What the connection sends then."""
        self.transport.write.reset_mock()
        self.clock.time.return_value = at_s
        self.connection._beat()
        return [Kind(call.args[0][4]) for call in self.transport.write.call_args_list]

    def hear(self, kind: Kind) -> None:
        self.connection.data_received(struct.pack("!IB", 0, kind))


@pytest.fixture
def pulse(monkeypatch: pytest.MonkeyPatch) -> Pulse:
    clock, transport = Mock(), Mock()
    clock.time.return_value = 0.0
    transport.is_closing.return_value = False
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    connection = FramedConnection(lambda *_: None)
    connection.connection_made(transport)
    return Pulse(clock, transport, connection)


def test_a_peer_that_answers_pings_is_kept_and_a_silent_one_is_lost(pulse: Pulse) -> None:
    for _ in range(3):
        assert pulse.beat(pulse.due_s) == [Kind.PING]
        pulse.hear(Kind.PONG)
        assert pulse.beat(pulse.due_s) == []
    assert pulse.beat(pulse.due_s) == [Kind.PING]
    pulse.transport.abort.assert_not_called()
    pulse.beat(pulse.due_s)
    pulse.transport.abort.assert_called_once()
    assert isinstance(pulse.connection.error, PeerLost)


def test_silence_does_not_count_while_this_process_stood_still(pulse: Pulse) -> None:
    """As after SIGSTOP and SIGCONT: timers fire before what waits in the socket is read."""
    assert pulse.due_s == 10.0
    assert pulse.beat(100.0) == [Kind.PING]
    assert pulse.due_s == 105.0
    assert pulse.beat(140.0) == [Kind.PING]
    pulse.transport.abort.assert_not_called()
    pulse.beat(pulse.due_s)
    pulse.transport.abort.assert_called_once()
    assert isinstance(pulse.connection.error, PeerLost)


async def test_what_is_aborted_before_it_is_open_is_closed_then() -> None:
    connection, transport = FramedConnection(lambda *_: None), Mock()
    connection.abort()
    connection.connection_made(transport)
    transport.abort.assert_called_once()


async def test_a_peer_that_is_gone_cancels_the_session_at_once(server: FramedServer, echo: Echo) -> None:
    async with peer_of(server) as peer:
        peer.ask("hold")
        await echo.stalled.wait()
        peer.writer.transport.abort()
        await eventually(lambda: echo.ended == ["cancelled"])


async def test_a_peer_that_reads_nothing_loses_its_session(server: FramedServer, echo: Echo) -> None:
    async with peer_of(server) as peer:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        peer.ask("flood")
        await eventually(lambda: echo.ended == ["cancelled"])


async def test_what_a_servicer_does_not_read_is_not_read_from_the_peer(
    server: FramedServer, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed_server, "INBOX_MESSAGES", 2)
    async with peer_of(server) as peer:
        peer.ask("hold")
        await echo.stalled.wait()
        payload = "x" * (1 << 20)
        for _ in range(64):
            peer.ask(payload)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await peer.writer.drain()


async def test_stopping_lets_sessions_end_within_the_grace(server: FramedServer, echo: Echo) -> None:
    async with peer_of(server) as peer:
        peer.ask("r")
        assert await peer.answer() == "r"
        port = server.location.port
        stopping = asyncio.create_task(server.stop(TIMEOUT_S))
        await asyncio.sleep(0)
        assert server.location == session_pb2.LocateSessionResponse()
        peer.send(Kind.END)
        assert await peer.frame() == (Kind.END, b"")
        await stopping
        assert echo.ended == ["done"]
        with pytest.raises(OSError):
            await asyncio.open_connection(HOST, port)
        await server.stop(0)


async def test_both_ends_send_at_once_what_is_small(server: FramedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FramedConnection] = []
    accept = server._accept
    monkeypatch.setattr(server, "_accept", lambda: made.append(served := accept()) or served)
    async with peer_of(server):
        transport = made[0].connection._transport  # type: ignore[attr-defined]
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
