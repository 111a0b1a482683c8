"""KV bytes between workers: the handoff's leases and the byte paths that read and write under them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sagellm_common.comm_backend import topology
from sagellm_common.comm_backend.backends import End, load
from sagellm_common.comm_backend.bridge import Encoder
from sagellm_common.comm_backend.config import KVTransportConfig, check_depth
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.hardware.host import Host, LocalHost
from sagellm_common.comm_backend.links import LinkTable
from sagellm_common.comm_backend.paths import OpenPath, PathsChannel
from sagellm_common.comm_backend.protocol import LeasedBlocks, Memory, PullRpc
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import KvLayout

log = logging.getLogger(__name__)


class _Candidate(NamedTuple):
    """A byte path that `auto` may take. `reach` says whom it gets to; None: it cannot be offered here."""

    backend: str
    why: str
    reach: Callable[[Host, End], str | None]


def _same_host(host: Host, end: End) -> str | None:
    return topology.host_key(host) or None


def _rdma(host: Host, end: End) -> str | None:
    return "rdma" if any(port.active for port in topology.rdma_ports(host)) else None


AUTO: Sequence[_Candidate] = (
    _Candidate("shm", "both on one host", _same_host),
    _Candidate("rdma", "RDMA on both sides", _rdma),
)
"""Best first; `tcp` follows for everybody else. Not among them is what is never faster than tcp: gloo, and Mooncake
without RDMA; and nccl, which has no place for two workers of one GPU and tells that late."""

BASE = "tcp"
OVERLAP_MIN_BYTES = 4 << 20
"""Where the link's costs are not known: moving less takes no longer than arranging more."""


def make_channel(
    cfg: TransportConfig,
    memory: KvMemory | Memory,
    leases: LeasedBlocks,
    host: str,
    port: int,
    pull_rpc: PullRpc | None = None,
    layout: Callable[[], KvLayout] | None = None,
    machine: Host | None = None,
) -> PathsChannel:
    """The configured byte path between `memory` and peers, or with `auto` all that work here; measured, and the pulls
    over each in turns by priority.

    It listens on host:port (0: any) once started; other paths than the base of `auto` take ports of their own.
    `layout` is asked for that of the memory when a receiver wants it in another dtype; None: there is no way to know.
    Raises ConfigError where the byte path cannot work here.
    """
    check_depth(cfg)
    settings, links = KVTransportConfig(cfg), LinkTable()
    encode = Encoder(memory if callable(memory) else lambda: memory, layout) if layout is not None else None
    end = End(cfg, memory, leases, host, port, pull_rpc, encode, MessagePlanner(settings, links))
    paths = [] if cfg.backend != "auto" else _open_auto(end, machine or LocalHost())
    base = BASE if cfg.backend == "auto" else cfg.backend
    paths.append(_open(end, base, "", "" if cfg.backend != "auto" else "reaches everybody"))
    channel = PathsChannel(paths, settings, links, end.planner(), fast_s=cfg.timeout_s / 2)
    _check_wire_dtype(cfg, channel)
    return channel


def _check_wire_dtype(cfg: TransportConfig, channel: PathsChannel) -> None:
    if not channel.encodes and cfg.wire_dtype not in ("same", "auto"):
        raise ConfigError(
            f"transport.wire_dtype: {cfg.wire_dtype!r} needs a byte path whose source converts; {channel.name} sends "
            "blocks as they are: set transport.backend to 'tcp', or wire_dtype to 'same'"
        )
    if not channel.encodes and cfg.wire_dtype == "auto":
        log.info(
            "KV crosses in the dtype it has: over %s, transport.wire_dtype auto finds nothing to choose", channel.name
        )


def _open_auto(end: End, machine: Host) -> list[OpenPath]:
    """Those of AUTO that can be offered here; says of each of the others why not."""
    found = []
    for backend, why, reach_of in AUTO:
        reach = reach_of(machine, end)
        if reach is None:
            log.info("transport.backend auto does not offer %s: this machine has nothing for it", backend)
            continue
        try:
            found.append(_open(replace(end, port=0), backend, reach, why))
        except (ConfigError, ImportError) as err:
            log.info("transport.backend auto does not offer %s: %s", backend, err)
    log.info("transport.backend auto offers %s", ", ".join([*(path.backend for path in found), BASE]))
    return found


def _open(end: End, backend: str, reach: str, why: str) -> OpenPath:
    from sagellm_common.comm_backend.telemetry import InstrumentedChannel, InstrumentedLeases

    measured = replace(end, leases=InstrumentedLeases(end.leases, backend, end.ask))
    channel = InstrumentedChannel(load(backend).open_channel(measured))
    return OpenPath(backend, PullQueue(channel, end.config.max_pulls, end.config.max_waiting_pulls), reach, why)


class OverlapRule:
    """Which prompts' KV is handed over while it is computed. Says in the log what holds."""

    def __init__(self, channel: PathsChannel) -> None:
        self._channel = channel
        cfg = channel.settings.now
        if cfg.overlap == "off":
            log.info("KV is pulled after prefill: transport.overlap is off")
        elif not channel.pulls_along:
            log.info("KV is pulled after prefill: over %s it cannot be pulled while it is computed", channel.name)
        else:
            log.info("KV %s is pulled while it is computed", _which(cfg.overlap_min_bytes))

    def worth(self, num_bytes: int, planned: bool | None) -> bool:
        """A configured size decides; else the plan, which knows the link; else (None: no plan says so) a fixed size."""
        cfg = self._channel.settings.now
        if cfg.overlap == "off" or not self._channel.pulls_along:
            return False
        if cfg.overlap_min_bytes is None and planned is not None:
            return planned
        return num_bytes >= (OVERLAP_MIN_BYTES if cfg.overlap_min_bytes is None else cfg.overlap_min_bytes)


def _which(min_bytes: int | None) -> str:
    return "of prompts that gain by it" if min_bytes is None else f"of at least {min_bytes} bytes"
