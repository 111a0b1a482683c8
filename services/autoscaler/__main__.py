"""`python -m services.autoscaler`: composes the autoscaler and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvloop

from sagellm_common.client.router import RouterClient
from sagellm_common.core import process
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import AutoscalerConfig, Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError, SageError
from sagellm_common.core.telemetry import setup_logging
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.http_server import HttpServer
from services.autoscaler.app import make_app, make_custom_metrics_app
from services.autoscaler.capacity import Targets
from services.autoscaler.kubernetes_scale import KubernetesScale, api_client, lead, own_namespace
from services.autoscaler.loop import Autoscaler
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.observe import DEFAULT_LIMITS, Observer
from services.autoscaler.orchestrator import DryRun, Orchestrator, Workload
from services.autoscaler.planner import Planner
from services.autoscaler.pool import Pool

EXIT_REFUSED = 2
GRACE_S = 2.0
FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class CustomMetrics:
    """Where the custom metrics API is served to API servers, which want TLS."""

    port: int
    certificate: tuple[Path, Path]


async def serve(
    config: Config, port: int, router_address: str, api_server: str, custom_metrics: CustomMetrics | None = None
) -> None:
    """Until SIGTERM or SIGINT. Raises ConfigError."""
    own = config.autoscaler
    targets = targets_of(own)
    namespace = own.namespace or own_namespace()
    async with contextlib.AsyncExitStack() as stack:
        router = await stack.enter_async_context(RouterClient(router_address, session=config.rpc.session))
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        api = await stack.enter_async_context(api_client(api_server)) if targets or own.lease else None
        observer = Observer(router, http, own.routers, config.of_role(WorkerRole.DECODE).engine.max_batch_size)
        orchestrator = _orchestrator(own, router, KubernetesScale(api, namespace, targets) if targets else None)
        metrics = AutoscalerMetrics()
        autoscaler = Autoscaler(
            own,
            observer,
            Planner(own, lambda: observer.costs, _targets(config), DEFAULT_LIMITS, flips=orchestrator.flips),
            DryRun(orchestrator) if own.mode == "dry-run" else orchestrator,
            metrics,
            SystemClock(),
        )

        async def deciding() -> None:
            metrics.leading.set(1)
            try:
                await autoscaler.run()
            finally:
                metrics.leading.set(0)

        identity = f"{socket.gethostname()}-{os.getpid()}"
        work: Awaitable[None] = lead(api, namespace, own.lease, identity, deciding) if own.lease and api else deciding()
        app = make_app(autoscaler, namespace, targets)
        server = HttpServer(app, config.cluster.host, port, grace_s=GRACE_S, on_ready=lambda: _ready(config, server))
        servers = [server]
        if custom_metrics is not None:
            asked = make_custom_metrics_app(autoscaler, namespace, targets)
            certificate = custom_metrics.certificate
            host = config.cluster.host
            servers.append(HttpServer(asked, host, custom_metrics.port, grace_s=GRACE_S, certificate=certificate))

        def stop() -> None:
            for one in servers:
                one.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        tasks = [asyncio.ensure_future(one.serve()) for one in servers] + [asyncio.ensure_future(work)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def targets_of(own: AutoscalerConfig) -> dict[Workload, str]:
    """The workloads on Kubernetes that it sets the sizes of; none where there are as many workers as there are."""
    if own.pool_target:
        return {} if own.pool_target == FIXED else {"pool": own.pool_target}
    return {"prefill": own.prefill_target, "decode": own.decode_target}


def _orchestrator(own: AutoscalerConfig, router: RouterClient, scale: KubernetesScale | None) -> Orchestrator:
    return Pool(router, scale) if own.pool_target or scale is None else scale


def _ready(config: Config, server: HttpServer) -> None:
    process.started()
    address = f"{config.cluster.host}:{server.port}"
    ready = {"ready": True, "id": "autoscaler", "address": address, "metrics_address": address, "pid": os.getpid()}
    print(json.dumps(ready), flush=True)


def _targets(config: Config) -> Targets:
    """Raises ConfigError: without targets there is no such thing as enough."""
    for name in ("ttft_target_ms", "tpot_target_ms"):
        if not getattr(config.router, name):
            raise ConfigError(f"router.{name} is 0; the autoscaler needs a target, such as --set router.{name}=500")
    return Targets(config.router.ttft_target_ms / 1e3, config.router.tpot_target_ms / 1e3)


def _checked(config: Config, router: str) -> str:
    """The router's address. Raises ConfigError for what is missing."""
    for name in ("prefill_target", "decode_target"):
        if not (getattr(config.autoscaler, name) or config.autoscaler.pool_target):
            raise ConfigError(
                f"autoscaler.{name} is empty; name the workload, such as deployment/sagellm-prefill, or set "
                "autoscaler.pool_target: one workload whose workers take either role, or `fixed`"
            )
    if not config.autoscaler.routers:
        raise ConfigError("autoscaler.routers is empty; name the routers' metrics, such as [sagellm-router:18802]")
    if not (router or config.router.address):
        raise ConfigError("where is the router? Give --router HOST:PORT or set router.address")
    return router or config.router.address


def _custom_metrics(args: argparse.Namespace) -> CustomMetrics | None:
    """Raises ConfigError."""
    if args.custom_metrics_port is None:
        return None
    if not 0 <= args.custom_metrics_port <= 65535:
        raise ConfigError(f"--custom-metrics-port {args.custom_metrics_port}: must be 0..65535")
    if not (args.certificate and args.certificate_key):
        raise ConfigError("--custom-metrics-port needs --certificate and --certificate-key: API servers speak TLS")
    return CustomMetrics(args.custom_metrics_port, (args.certificate, args.certificate_key))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="services.autoscaler", description="Scales prefill and decode, changes roles."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one setting")
    parser.add_argument("--port", type=int, default=0, help="HTTP; 0 is ephemeral")
    parser.add_argument("--router", default="", metavar="HOST:PORT", help="gRPC; default: router.address")
    parser.add_argument("--api-server", default="", metavar="URL", help="Kubernetes; default: the pod's, or KUBECONFIG")
    parser.add_argument("--custom-metrics-port", type=int, help="HTTPS, custom.metrics.k8s.io alone: for an APIService")
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="of that port")
    parser.add_argument("--certificate-key", type=Path, metavar="PEM")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, os.environ, args.set)
        setup_logging(config.telemetry.log_level)
        if not 0 <= args.port <= 65535:
            raise ConfigError(f"--port {args.port}: must be 0..65535")
        router = _checked(config, args.router)
        uvloop.run(serve(config, args.port, router, args.api_server, _custom_metrics(args)))
    except SageError as err:
        print(f"services.autoscaler: {err.reason}: {err.message}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
