"""What carries a session stream, as its calling end sees it: a gRPC stream, or a framed TCP connection.

auto ──► Locate ──► framed, if it is offered and can be reached
            └─────► grpc, else: said in the log, shown by `sagellm status`
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.message import Message

from sagellm_common.core.errors import InvalidRequest, PeerLost
from sagellm_common.rpc.channels import MAX_MESSAGE_BYTES, rpc_errors
from sagellm_common.rpc.framed import CLOSE_GRACE_S, FramedConnection, Kind
from sagellm_common.rpc.framed_server import METHOD
from sagellm_common.rpc.gen.sagellm.v1 import session_pb2, session_pb2_grpc
from sagellm_common.rpc.status import from_rpc_error

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 256
"""With this many unsent messages a gRPC stream is full: the peer is not reading."""
OPEN_TIMEOUT_S = 5.0

Choice = Literal["auto", "framed", "grpc"]
Deliver = Callable[[Any], None]


class Carrier(Protocol):
    """One life of a session stream. All its messages are delivered as they come, to a callback that must not wait."""

    name: ClassVar[Literal["framed", "grpc"]]

    @property
    def full(self) -> bool:
        """The peer does not keep up with what is sent."""

    def send(self, message: Any) -> None:
        """Never waits, even when it is full."""

    def send_all(self, messages: Sequence[Any]) -> None:
        """The same, for several at once."""

    async def run(self) -> None:
        """Returns when the stream has ended, or raises SageError with the reason. Cancelled, it ends the stream."""


class GrpcCarrier:
    name: ClassVar[Literal["framed", "grpc"]] = "grpc"

    def __init__(self, call: Any, deliver: Deliver, on_room: Callable[[], None]) -> None:
        self._call = call
        self._deliver = deliver
        self._on_room = on_room
        self._outbox: deque[Any] = deque()
        self._work = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._outbox) >= OUTBOX_MESSAGES

    def send(self, message: Any) -> None:
        self._outbox.append(message)
        self._work.set()

    def send_all(self, messages: Sequence[Any]) -> None:
        self._outbox.extend(messages)
        self._work.set()

    async def run(self) -> None:
        writer = asyncio.create_task(self._write(), name="session writer")
        try:
            async for message in self._call:
                self._deliver(message)
        except grpc.aio.AioRpcError as err:
            raise from_rpc_error(err) from err
        finally:
            writer.cancel()
            self._call.cancel()
            await asyncio.wait([writer])

    async def _write(self) -> None:
        """The only writer: concurrent writes on one gRPC stream are an error."""
        try:
            while True:
                await self._work.wait()
                while self._outbox:
                    message = self._outbox.popleft()
                    self._on_room()
                    await self._call.write(message)
                self._work.clear()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._call.cancel()  # the reader learns why


class FramedCarrier:
    name: ClassVar[Literal["framed", "grpc"]] = "framed"

    def __init__(self, connection: FramedConnection, reply: type[Message], deliver: Deliver) -> None:
        self._connection = connection
        self._parse = reply.FromString
        self._deliver = deliver
        connection.greeted(self._take)

    @property
    def full(self) -> bool:
        return self._connection.full

    def send(self, message: Message) -> None:
        """Raises InvalidRequest for a message beyond what the peer takes: it would end the session."""
        self.send_all([message])

    def send_all(self, messages: Sequence[Message]) -> None:
        """As `send`, in one write."""
        payloads = [message.SerializeToString() for message in messages]
        for payload in payloads:
            if len(payload) > MAX_MESSAGE_BYTES:
                raise InvalidRequest(f"a message of {len(payload)} bytes; a session takes at most {MAX_MESSAGE_BYTES}")
        self._connection.send(Kind.MESSAGE, *payloads)

    async def run(self) -> None:
        connection = self._connection
        try:
            await asyncio.shield(connection.lost)
        finally:
            connection.end()
            await asyncio.wait([connection.lost], timeout=2 * CLOSE_GRACE_S)
        raise connection.error or PeerLost("the peer has ended the session")

    def _take(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.MESSAGE:
            self._deliver(self._parse(payload))
        elif kind is Kind.END:
            self._connection.abort()
        else:
            raise InvalidRequest("a second HELLO")


class NotOffered(Exception):
    """No framed session with this peer; the text says why."""


class Opener:
    """Opens the Session stream of `service` at `address`, host:port of the gRPC server that `channel` leads to."""

    def __init__(self, channel: grpc.aio.Channel, address: str, service: str, choice: Choice) -> None:
        self._channel = channel
        self._address = address
        self._service = service
        self._choice = choice
        descriptor = default_pool().FindServiceByName(service)
        method = descriptor.methods_by_name[METHOD]
        self._reply = message_factory.GetMessageClass(method.output_type)
        self._open_call: Any = channel.stream_stream(
            f"/{service}/{METHOD}",
            request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=self._reply.FromString,
        )

    async def open(self, deliver: Deliver, on_room: Callable[[], None]) -> Carrier:
        """Raises PeerLost, DeadlineExceeded; and PeerLost with "framed" for a peer that offers none."""
        if self._choice != "grpc":
            try:
                return await self._open_framed(deliver, on_room)
            except NotOffered as why:
                if self._choice == "framed":
                    raise PeerLost(
                        f"no framed session with {self._service} at {self._address}: {why}; "
                        "rpc.session auto uses gRPC instead"
                    ) from why
                log.warning("%s at %s: no framed session, gRPC is used instead: %s", self._service, self._address, why)
        return GrpcCarrier(self._open_call(), deliver, on_room)

    async def _open_framed(self, deliver: Deliver, on_room: Callable[[], None]) -> FramedCarrier:
        location = await self._locate()
        loop = asyncio.get_running_loop()
        welcome: asyncio.Future[None] = loop.create_future()

        def on_frame(kind: Kind, payload: bytes) -> None:
            if kind is Kind.HELLO and not welcome.done():
                welcome.set_result(None)

        host = self._address.rpartition(":")[0].strip("[]")
        connection: FramedConnection | None = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: FramedConnection(on_frame, on_room), host, location.port
                )
                hello = session_pb2.SessionHello(service=self._service, token=location.token)
                connection.send(Kind.HELLO, hello.SerializeToString())
                await asyncio.wait([welcome, connection.lost], return_when=asyncio.FIRST_COMPLETED)
        except (OSError, TimeoutError) as err:
            raise NotOffered(
                f"port {location.port} of {host} cannot be reached: {err or 'it does not answer'}"
            ) from err
        finally:
            if connection is not None and not welcome.done():
                connection.abort()
        if not welcome.done():
            raise NotOffered(str(connection.error or "it hung up"))
        return FramedCarrier(connection, self._reply, deliver)

    async def _locate(self) -> session_pb2.LocateSessionResponse:
        stub = session_pb2_grpc.SessionServiceStub(self._channel)
        with rpc_errors():
            try:
                location: session_pb2.LocateSessionResponse = await stub.Locate(
                    session_pb2.LocateSessionRequest(), timeout=OPEN_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as err:
                if err.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                raise NotOffered("it does not know of them") from err
        if not location.port:
            raise NotOffered("it does not offer them")
        return location
