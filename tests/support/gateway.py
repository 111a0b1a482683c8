"""The real gateway, served from this process on an ephemeral port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sagellm_common.client.models import ModelDirectory
from sagellm_common.client.router import RouterClient
from sagellm_common.core.config import GatewayConfig
from sagellm_common.rpc.http_server import HttpServer
from services.gateway.app import Gateway


@asynccontextmanager
async def serve_gateway(
    router_address: str, config: GatewayConfig | None = None, *, timeout_s: float = 30.0
) -> AsyncIterator[str]:
    """Yields its base URL, without /v1."""
    ready = asyncio.Event()
    async with RouterClient(router_address) as router:
        app = Gateway(config or GatewayConfig(), router, ModelDirectory(router), timeout_s=timeout_s)
        server = HttpServer(app, "127.0.0.1", 0, grace_s=1, on_ready=ready.set)
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve())
            async with asyncio.timeout(10):
                await ready.wait()
            try:
                yield f"http://127.0.0.1:{server.port}"
            finally:
                server.stop()
