"""uvicorn (httptools, uvloop) in this process.

Not granian, though it writes a chunk in 3 µs instead of 9: embedded it neither tells its ephemeral port nor refuses
a port in use, and a chunk's gRPC message costs 30 µs anyway.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from sagellm_common.core.errors import ConfigError


class _Server(uvicorn.Server):
    """Tells when it serves, and leaves signals to `__main__`: uvicorn would die of them after a clean stop."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves `app` on host:port (0 picks a free one), over TLS with `certificate`, the PEM files of one and of its key.

    Raises ConfigError when the address cannot be bound, or the certificate cannot be used.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        grace_s: float,
        certificate: tuple[Path, Path] | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        context = _context(*certificate) if certificate is not None else None
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as err:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {err.strerror}; choose another --port, or 0 for a free one"
            ) from err
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(grace_s)),
            ssl_context_factory=(lambda *_: context) if context is not None else None,
        )
        self._server = _Server(config, on_ready)

    async def serve(self) -> None:
        """Until `stop`; then connections that are busy have `grace_s` seconds to finish."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as err:
        raise ConfigError(f"certificate {certificate} with key {key}: {err}; both must be PEM and of one pair") from err
    return context
