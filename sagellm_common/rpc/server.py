"""A gRPC server as every service runs it: health, reflection, typed errors, traces and metrics included."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sagellm_common.core.errors import ConfigError
from sagellm_common.rpc.channels import MAX_MESSAGE_BYTES
from sagellm_common.rpc.framed_server import FramedServer, SessionServicer, session_methods
from sagellm_common.rpc.gen.sagellm.v1 import session_pb2_grpc
from sagellm_common.rpc.interceptors import ServiceInterceptor

_OPTIONS: list[tuple[str, int]] = [
    # Without this a second server on the same port would silently share its connections.
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    # Callers ping a silent connection every ten seconds; by default a server takes that for abuse and hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


LIVE = "live"
"""A health service of its own: SERVING as long as the process answers. One that drains is not ready, and yet must not
be restarted."""


@dataclass(frozen=True, slots=True)
class Registrar:
    """A servicer to serve: `Registrar("sagellm.v1.DecodeService", add_DecodeServiceServicer_to_server, servicer)`."""

    name: str
    add: Callable[[Any, grpc.aio.Server], None]
    servicer: Any


class GrpcServer:
    """Serves `services` on `bind` (host:port, port 0 picks a free one) between `start` and `stop`.

    Session streams of `services` are offered as framed connections, too, on `session_port`; None: over gRPC alone.
    """

    def __init__(self, bind: str, services: Sequence[Registrar], *, session_port: int | None = 0) -> None:
        self._bind = bind
        self._session_port = session_port
        methods = session_methods({service.name: service.servicer for service in services})
        self._sessions = FramedServer(methods)
        if methods:
            add = session_pb2_grpc.add_SessionServiceServicer_to_server
            services = [*services, Registrar("sagellm.v1.SessionService", add, SessionServicer(self._sessions))]
        else:
            self._session_port = None
        self._names = [service.name for service in services]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._server = grpc.aio.server(interceptors=[ServiceInterceptor()], options=_OPTIONS)
        for service in services:
            service.add(service.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def start(self) -> int:
        """Serves, and returns the port. Health says NOT_SERVING until `set_serving(True)`.

        Raises ConfigError when the address cannot be bound.
        """
        await self.set_serving(False)
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        try:
            port = self._server.add_insecure_port(self._bind)
        except RuntimeError as err:
            raise ConfigError(
                f"cannot listen on {self._bind}: the port is in use or the address is not this machine's; "
                "choose another port or stop the process that holds it"
            ) from err
        if self._session_port is not None:
            await self._sessions.start(self._bind.rpartition(":")[0].strip("[]"), self._session_port)
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers, for the server as a whole ('') and for each service but `LIVE`."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names]:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls; running ones have `grace_s` seconds before they are cancelled. Idempotent."""
        await self.set_serving(False)
        await asyncio.gather(self._server.stop(grace_s), self._sessions.stop(grace_s))
