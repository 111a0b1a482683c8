"""Byte paths by name: modules with `open_channel`, imported when chosen, for some take a second and some a wheel."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.links import LinkTable
from sagellm_common.comm_backend.protocol import (
    CommBackendProtocol,
    Encode,
    KVTransferChannel,
    LeasedBlocks,
    Memory,
    PullRpc,
    Regions,
)
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory, KvRegion

MODULES = {
    "gloo": "sagellm_common.comm_backend.backends.gloo",
    "mooncake": "sagellm_common.comm_backend.backends.mooncake",
    "nccl": "sagellm_common.comm_backend.backends.nccl",
    "rdma": "sagellm_common.comm_backend.backends.rdma",
    "shm": "sagellm_common.comm_backend.backends.shm",
    "tcp": "sagellm_common.comm_backend.backends.tcp",
}


@dataclass(frozen=True, slots=True)
class End:
    """One worker's end of a byte path, before it is opened. It listens on host:port (0: any) once started."""

    config: TransportConfig
    memory: KvMemory | Memory
    leases: LeasedBlocks
    host: str
    port: int
    pull_rpc: PullRpc | None = None
    encode: Encode | None = None
    messages: MessagePlanner | None = None

    def ask(self) -> KvMemory:
        """The memory as it is now: a store has none before its first layout."""
        return self.memory() if callable(self.memory) else self.memory

    def planner(self) -> MessagePlanner:
        """How blocks are put into messages: as measured and as set at run time, or else by `config` alone."""
        return self.messages or MessagePlanner(KVTransportConfig(self.config), LinkTable())

    def in_place(self) -> Regions:
        """`ask` for a byte path that works on host memory only; raises ConfigError for any other, as soon as known."""

        def ask() -> KvRegion:
            region = self.ask()
            if not isinstance(region, KvRegion):
                raise ConfigError(
                    f"transport.backend: {self.config.backend!r} moves KV of host memory only; use 'tcp', which stages "
                    "a device's"
                )
            return region

        if not callable(self.memory):
            ask()
        return ask


class Backend(Protocol):
    def open_channel(self, end: End) -> KVTransferChannel:
        """Raises ConfigError naming what the machine or the configuration lacks."""


COLLECTIVES = {
    "gloo": "sagellm_common.comm_backend.backends.gloo",
    "nccl": "sagellm_common.comm_backend.backends.nccl",
    "tcp": "sagellm_common.comm_backend.backends.tcp",
}
"""Those that form groups: modules with `open_comm`. The others only let one side read what the other has."""


def open_comm(name: str, host: str, port: int) -> CommBackendProtocol:
    """This process's end of the groups that are formed over `name`. It listens on host:port (0: any) once started.

    Raises ConfigError for a byte path that has no groups, and where it cannot work here.
    """
    if name not in COLLECTIVES:
        raise ConfigError(f"collectives: {name!r} has none, it only moves KV; use {' or '.join(COLLECTIVES)}")
    return cast(CommBackendProtocol, importlib.import_module(COLLECTIVES[name]).open_comm(host, port))


def load(name: str) -> Backend:
    """The byte path of this name, a key of MODULES."""
    return cast(Backend, importlib.import_module(MODULES[name]))
