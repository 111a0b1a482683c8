"""The command line of every worker process, and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from sagellm_common.core import failpoints
from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError, SageError
from sagellm_common.core.process import no_collections
from sagellm_common.core.telemetry import setup_logging, setup_tracing, shutdown_tracing
from sagellm_common.core.topology import TopologyStore
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.channels import ChannelPool

EXIT_REFUSED = 2
"""The worker never served, or must not any more: configuration, or its id belongs to another process."""

CONNECT_TIMEOUT_S = 2.0
"""One try to reach the router; `WorkerRuntime` tries on."""


@dataclass(frozen=True, slots=True)
class WorkerArgs:
    """What one worker process was told. Ports of 0 are ephemeral; `router` is host:port.

    `config` is as a worker of `role` has it, `loaded` for all roles.
    """

    role: WorkerRole
    config: Config
    loaded: Config
    worker_id: str
    port: int
    data_port: int
    session_port: int
    metrics_port: int
    router: str


MODEL_ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH)


def parse_worker_args(role: WorkerRole | None, argv: Sequence[str]) -> WorkerArgs:
    """`role` None: one of the flags says it. Raises ConfigError; exits on a usage error, as command lines do."""
    parser = argparse.ArgumentParser(
        prog=_program(role), description=f"A sageLLM {role or 'prefill or decode'} worker."
    )
    if role is None:
        parser.add_argument("--role", choices=[r.value for r in MODEL_ROLES], required=True, help="to begin with")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one setting")
    parser.add_argument("--id", help="unique in the cluster; kept over restarts; ROLE-0 unless given")
    parser.add_argument("--port", type=int, default=0, help="gRPC; 0 is ephemeral")
    parser.add_argument("--data-port", type=int, default=0, help="KV byte path; 0 is ephemeral")
    parser.add_argument("--session-port", type=int, default=0, help="framed sessions; 0 is ephemeral")
    parser.add_argument("--metrics-port", type=int, default=0, help="Prometheus; 0 is ephemeral")
    parser.add_argument("--router", default="", metavar="HOST:PORT", help="for the embedded topology")
    args = parser.parse_args(argv)
    for name in ("port", "data_port", "session_port", "metrics_port"):
        if not 0 <= getattr(args, name) <= 65535:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 0..65535")
    if args.id == "":
        raise ConfigError("--id is empty: give each worker a name that is unique in the cluster")
    loaded = load_config(args.config, os.environ, args.set)
    role = role or WorkerRole(args.role)
    return WorkerArgs(
        role=role,
        config=loaded.of_role(role),
        loaded=loaded,
        worker_id=args.id or f"{role}-0",
        port=args.port,
        data_port=args.data_port,
        session_port=args.session_port,
        metrics_port=args.metrics_port,
        router=args.router or loaded.router.address,
    )


def make_topology(config: Config, router: str, channels: ChannelPool) -> TopologyStore:
    """The topology as workers see it: etcd, or the router's own. Raises ConfigError."""
    if config.topology.backend == "etcd":
        from sagellm_common.core.topology_etcd import EtcdTopology

        return EtcdTopology(config.topology.endpoints, config.cluster.name)
    from sagellm_common.rpc.topology_client import RemoteTopology

    if not router:
        raise ConfigError("topology.backend is embedded: say where the router is, --router HOST:PORT")
    return RemoteTopology(router, channels, connect_timeout_s=CONNECT_TIMEOUT_S)


def worker_main(role: WorkerRole | None, compose: Callable[[WorkerArgs], Awaitable[None]], argv: Sequence[str]) -> int:
    """Runs `compose` to its end; returns the exit code. A typed error is told on stderr, without a traceback."""
    try:
        args = parse_worker_args(role, argv)
        failpoints.name_process(args.worker_id)
        setup_logging(args.config.telemetry.log_level)
        setup_tracing(f"sagellm-{args.role}", args.config.telemetry.otlp_endpoint)
        with no_collections():
            uvloop.run(_awaited(compose(args)))
    except SageError as err:
        print(f"{_program(role)}: {err.reason}: {err.message}", file=sys.stderr)
        return EXIT_REFUSED
    finally:
        shutdown_tracing()
    return 0


def _program(role: WorkerRole | None) -> str:
    return f"services.{role or 'worker'}"


async def _awaited(what: Awaitable[None]) -> None:
    await what
