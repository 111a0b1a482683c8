"""`python -m services.router`: composes the router and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry, start_http_server

from sagellm_common.core import process
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import Config, RouterConfig
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError, SageError
from sagellm_common.core.telemetry import setup_logging, setup_tracing, shutdown_tracing
from sagellm_common.core.topology import TopologyStore
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2_grpc, topology_pb2_grpc
from sagellm_common.rpc.routes import RouteSigner
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.topology_service import TopologyServicer
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.router.cached_blocks import CachedBlocks
from services.router.cost_file import cost_path, kept, load_costs
from services.router.costs import CostLearner
from services.router.explain import ExplainLog
from services.router.moves import Moves
from services.router.observed import ObservedPipeline, RouterMetrics
from services.router.pipeline import Pipeline
from services.router.placing import Placer
from services.router.routes import Routes
from services.router.separations import Separations
from services.router.servicer import InferenceServicer, explain_plan, set_strategy
from services.router.strategies import Strategies
from services.router.transfers import TransferPlanner
from services.router.workers import Workers

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.2
EXIT_REFUSED = 2


def make_topology(config: Config) -> TopologyStore:
    """Raises ConfigError."""
    if config.topology.backend == "etcd":
        from sagellm_common.core.topology_etcd import EtcdTopology

        return EtcdTopology(config.topology.endpoints, config.cluster.name)
    return EmbeddedTopology()


@dataclass(frozen=True, slots=True)
class Router:
    """A serving router; `address` is host:port."""

    address: str
    pipeline: ObservedPipeline
    workers: Workers
    server: GrpcServer

    async def drain(self) -> None:
        """Says NOT_SERVING, turns new requests away, returns when none is in flight. The caller bounds the wait."""
        await self.server.set_serving(False)
        await self.pipeline.drain()


@asynccontextmanager
async def serving(
    config: Config,
    topology: TopologyStore,
    *,
    port: int = 0,
    session_port: int = 0,
    metrics: RouterMetrics | None = None,
) -> AsyncIterator[Router]:
    """A router that serves for the time of the block. Closes the topology.

    Raises ConfigError (port in use, unknown strategy, no directory for the costs), PeerLost (no etcd).
    """
    explain = ExplainLog()
    async with contextlib.AsyncExitStack() as stack:
        channels = await stack.enter_async_context(ChannelPool())
        stack.push_async_callback(topology.close)
        await topology.start()
        metrics = metrics or RouterMetrics()
        cached_blocks = CachedBlocks(config.index, SystemClock())
        metrics.registry.register(cached_blocks)
        stack.callback(metrics.registry.unregister, cached_blocks)
        costs, learner = await stack.enter_async_context(_costs(config.router, metrics.registry))
        strategies = Strategies(config.router, costs, partial(setattr, learner, "active", True))
        learner.active = strategies.ask_costs or bool(config.router.cost_model_path)
        on_steps = learner.told
        workers = Workers(topology, channels, config.rpc.session, cached_blocks, on_steps)
        stack.push_async_callback(workers.close)
        moves = Moves(workers)
        separations = Separations(config.router.disaggregate)
        metrics.registry.register(separations)
        stack.callback(metrics.registry.unregister, separations)
        transfers = TransferPlanner(config.transport, workers.cost)
        placer = Placer(config.router, strategies, transfers, separations, costs)
        inner = Pipeline(
            config.router,
            workers,
            placer,
            explain,
            SystemClock(),
            random.Random(),
            transfers,
            separations,
            learner,
            moves,
        )
        pipeline = ObservedPipeline(inner, metrics)
        routes = Routes(inner, RouteSigner(config.rpc.route_key), metrics) if config.rpc.tokens == "direct" else None
        inference = InferenceServicer(pipeline, workers, explain, config.router.request_timeout_s, routes)
        explains, sets = partial(explain_plan, explain), partial(set_strategy, strategies)
        known = TopologyServicer(topology, channels, workers.status, explains, costs.to_dict, sets)
        server = GrpcServer(
            f"{config.cluster.host}:{port}",
            [
                Registrar(
                    "sagellm.v1.InferenceService", inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference
                ),
                Registrar("sagellm.v1.TopologyService", topology_pb2_grpc.add_TopologyServiceServicer_to_server, known),
            ],
            session_port=session_port if config.rpc.session != "grpc" else None,
        )
        bound = await server.start()
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        workers.start()
        await stack.enter_async_context(_running(moves.run(), "moves"))
        await server.set_serving(True)
        yield Router(f"{config.cluster.host}:{bound}", pipeline, workers, server)


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """For the time of the block."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def _costs(config: RouterConfig, registry: CollectorRegistry) -> AsyncIterator[tuple[CostModel, CostLearner]]:
    """Raises ConfigError."""
    path = cost_path(config)
    costs = load_costs(path) if path else CostModel()
    learner = CostLearner(costs, SystemClock())
    registry.register(learner)
    try:
        async with kept(costs, path) if path else contextlib.nullcontext():
            yield costs, learner
    finally:
        registry.unregister(learner)


async def run(config: Config, port: int, session_port: int, metrics_port: int) -> None:
    """Serves until SIGTERM or SIGINT; then what is in flight may finish, until the grace or a second signal."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    with _metrics_server(config.cluster.host, metrics_port) as metrics_address:
        async with serving(config, make_topology(config), port=port, session_port=session_port) as router:
            ready = {"ready": True, "address": router.address, "data_address": "", "metrics_address": metrics_address}
            process.started()
            print(json.dumps({**ready, "pid": os.getpid(), "id": "router"}), flush=True)
            await stop.wait()
            log.info("stopping, %d requests in flight", router.pipeline.in_flight)
            ends = [asyncio.create_task(router.drain()), asyncio.create_task(stop_now.wait())]
            grace_s = config.cluster.drain_grace_s
            _, waiting = await asyncio.wait(ends, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()


@contextlib.contextmanager
def _metrics_server(host: str, port: int) -> Iterator[str]:
    try:
        server, thread = start_http_server(port, host)
    except OSError as err:
        raise ConfigError(f"--metrics-port {port}: cannot listen on {host}:{port}: {err.strerror}") from err
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="services.router", description="The sageLLM router.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one setting")
    parser.add_argument("--port", type=int, default=0, help="gRPC; 0 is ephemeral")
    parser.add_argument("--session-port", type=int, default=0, help="framed sessions; 0 is ephemeral")
    parser.add_argument("--metrics-port", type=int, default=0, help="Prometheus; 0 is ephemeral")
    args = parser.parse_args(argv)
    try:
        for name in ("port", "session_port", "metrics_port"):
            if not 0 <= getattr(args, name) <= 65535:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 0..65535")
        config = load_config(args.config, os.environ, args.set)
        setup_logging(config.telemetry.log_level)
        setup_tracing("sagellm-router", config.telemetry.otlp_endpoint)
        uvloop.run(run(config, args.port, args.session_port, args.metrics_port))
    except SageError as err:
        print(f"services.router: {err.reason}: {err.message}", file=sys.stderr)
        return EXIT_REFUSED
    finally:
        shutdown_tracing()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
