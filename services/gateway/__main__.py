"""`python -m services.gateway`: the OpenAI API in front of one router."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from sagellm_common.client.models import ModelDirectory
from sagellm_common.client.router import RouterClient
from sagellm_common.core import process
from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError, SageError
from sagellm_common.core.ports import SagePorts
from sagellm_common.core.telemetry import setup_logging, setup_tracing, shutdown_tracing
from sagellm_common.rpc.http_server import HttpServer
from services.gateway.app import Gateway

EXIT_REFUSED = 2


async def serve(config: Config, port: int, router_address: str) -> None:
    """Until SIGTERM or SIGINT."""

    def on_ready() -> None:
        process.started()
        print(json.dumps(ready), flush=True)

    async with RouterClient(router_address, session=config.rpc.session, tokens=config.rpc.tokens) as router:
        models = ModelDirectory(router, model_path=config.model.path or None)
        app = Gateway(config.gateway, router, models, timeout_s=config.router.request_timeout_s)
        server = HttpServer(app, config.cluster.host, port, grace_s=config.cluster.drain_grace_s, on_ready=on_ready)
        address = f"{config.cluster.host}:{server.port}"
        ready = {
            "ready": True,
            "id": "gateway",
            "address": address,
            "url": f"http://{address}",
            "metrics_address": address,
            "pid": os.getpid(),
        }
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        await server.serve()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="services.gateway", description="The OpenAI API in front of one router.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one setting")
    parser.add_argument("--port", type=int, help="HTTP; 0 is ephemeral; default: from cluster.port_base")
    parser.add_argument("--router", default="", metavar="HOST:PORT,…", help="default: router.address")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, os.environ, args.set)
        setup_logging(config.telemetry.log_level)
        setup_tracing("sagellm-gateway", config.telemetry.otlp_endpoint)
        ports = SagePorts(config.cluster.port_base)
        port = args.port if args.port is not None else ports.gateway if config.cluster.port_base else 0
        if not 0 <= port <= 65535:
            raise ConfigError(f"--port {port}: must be 0..65535")
        router = args.router or config.router.address
        if not router and config.cluster.port_base:
            router = f"{config.cluster.host}:{ports.router}"
        if not router:
            raise ConfigError("where is the router? Give --router HOST:PORT or set router.address")
        uvloop.run(serve(config, port, router))
    except SageError as err:
        print(f"services.gateway: {err.reason}: {err.message}", file=sys.stderr)
        return EXIT_REFUSED
    finally:
        shutdown_tracing()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
