"""Session streams over framed TCP connections: the same `Session` methods of the same servicers that gRPC calls.

Who may connect has asked `Locate` over gRPC and shows the token it was told, so what guards the gRPC port guards this
one. For TLS, `create_server` here and `create_connection` in `carriers` take an SSL context.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import Default as default_pool
from google.protobuf.message import Message

from sagellm_common.core.errors import ConfigError, InvalidRequest, PeerLost
from sagellm_common.rpc.framed import FramedConnection, Kind
from sagellm_common.rpc.gen.sagellm.v1 import session_pb2, session_pb2_grpc
from sagellm_common.rpc.interceptors import counted_call, run_handler

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
INBOX_MESSAGES = 256
"""Beyond this many unread messages the connection is not read."""

METHOD = "Session"


@dataclass(frozen=True, slots=True)
class SessionMethod:
    """What gRPC knows of a servicer's Session method."""

    handler: Callable[..., Any]
    request: type[Message]


def session_methods(servicers: Mapping[str, Any]) -> dict[str, SessionMethod]:
    """Those of `servicers`, by full service name, that have a Session stream."""
    found = {}
    for name, servicer in servicers.items():
        service: ServiceDescriptor = default_pool().FindServiceByName(name)
        method = service.methods_by_name.get(METHOD)
        if method is not None and method.client_streaming and method.server_streaming:
            found[name] = SessionMethod(servicer.Session, message_factory.GetMessageClass(method.input_type))
    return found


class FramedServer:
    """Serves `methods` between `start` and `stop`."""

    def __init__(self, methods: Mapping[str, SessionMethod]) -> None:
        self._methods = methods
        self._token = secrets.token_hex(16)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[_Served] = set()

    @property
    def location(self) -> session_pb2.LocateSessionResponse:
        """What a caller needs to know to connect. No port while it does not serve."""
        return session_pb2.LocateSessionResponse(port=self._port, token=self._token if self._port else "")

    async def start(self, host: str, port: int) -> None:
        """Raises ConfigError when the address cannot be bound."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: self._accept().connection, host, port)
        except OSError as err:
            raise ConfigError(
                f"cannot listen for sessions on {host}:{port}: {err.strerror or err}; "
                "choose another --session-port, or 0 for a free one"
            ) from err
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self, grace_s: float) -> None:
        """No new sessions; running ones have `grace_s` seconds before they are cancelled. Idempotent."""
        if self._server is None:
            return
        self._port = 0
        self._server.close()
        running = [served.task for served in self._connections if served.task is not None]
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)
        lost = [served.connection.lost for served in self._connections]
        for served in list(self._connections):
            served.connection.abort()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, *lost, return_exceptions=True)

    def _accept(self) -> _Served:
        served = _Served(self._methods, self._token)
        self._connections.add(served)
        served.connection.lost.add_done_callback(lambda _: self._connections.discard(served))
        return served


class _Served:
    """One connection: HELLO, then one session in a task of its own, which its end cancels."""

    def __init__(self, methods: Mapping[str, SessionMethod], token: str) -> None:
        self._methods = methods
        self._token = token
        self.connection = FramedConnection(self._greet)
        self.connection.lost.add_done_callback(self._lost)
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self._no_hello)
        self.task: asyncio.Task[None] | None = None

    def _greet(self, kind: Kind, payload: bytes) -> None:
        self._hello_timer.cancel()
        if kind is not Kind.HELLO:
            raise InvalidRequest(f"the first frame is a {kind.name}, but must be a HELLO")
        hello = session_pb2.SessionHello.FromString(payload)
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            raise PeerLost("the token is not of this server's life: ask Locate again")
        method = self._methods.get(hello.service)
        if method is None:
            raise InvalidRequest(f"no sessions of {hello.service!r} here, only of {', '.join(self._methods)}")
        requests = _Requests(self.connection, method.request)
        self.connection.greeted(requests.take)
        self.connection.send(Kind.HELLO)
        self.task = asyncio.create_task(self._serve(hello.service, method, requests), name=f"framed {hello.service}")

    async def _serve(self, service: str, method: SessionMethod, requests: _Requests) -> None:
        with counted_call(service, METHOD, "", self.connection.end):
            await run_handler(method.handler, requests, _Answers(self.connection))
        self.connection.end()

    def _no_hello(self) -> None:
        self.connection.end(InvalidRequest(f"no HELLO within {HELLO_TIMEOUT_S:g} s"))

    def _lost(self, _: asyncio.Future[None]) -> None:
        self._hello_timer.cancel()
        if self.task is not None:
            self.task.cancel()


class _Requests:
    """The session's messages, as a servicer iterates over them. It ends with the peer's END."""

    def __init__(self, connection: FramedConnection, message: type[Message]) -> None:
        self._connection = connection
        self._parse = message.FromString
        self._inbox: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._paused = False

    def take(self, kind: Kind, payload: bytes) -> None:
        """The connection's `on_frame`."""
        if kind is Kind.HELLO:
            raise InvalidRequest("a second HELLO")
        if kind is Kind.END:
            self._ended = True
        else:
            self._inbox.append(self._parse(payload))
            if len(self._inbox) >= INBOX_MESSAGES and not self._paused:
                self._paused = True
                self._connection.pause_reading()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        while not self._inbox:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._paused and len(self._inbox) <= INBOX_MESSAGES // 2:
            self._paused = False
            self._connection.resume_reading()
        return self._inbox.popleft()


class _Answers:
    """Of a servicer's context, what a session needs."""

    def __init__(self, connection: FramedConnection) -> None:
        self._connection = connection
        self._waiter: asyncio.Future[None] | None = None
        connection.on_room = self._room

    def write_now(self, message: Message) -> bool:
        """As `write`, if the peer takes more now; False, and nothing is sent, if it does not."""
        if self._connection.full:
            return False
        self._connection.send(Kind.MESSAGE, message.SerializeToString())
        return True

    async def write(self, message: Message) -> None:
        """Returns when the peer takes more. The connection's end cancels the session."""
        self._connection.send(Kind.MESSAGE, message.SerializeToString())
        while self._connection.full:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _room(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    def __init__(self, server: FramedServer) -> None:
        self._server = server

    async def Locate(
        self, request: session_pb2.LocateSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> session_pb2.LocateSessionResponse:
        return self._server.location
