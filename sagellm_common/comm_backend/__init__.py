"""KV bytes between workers: the handoff's leases and the byte paths that read and write under them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from sagellm_common.comm_backend.backends import End, load
from sagellm_common.comm_backend.bridge import Encoder
from sagellm_common.comm_backend.protocol import KVTransferChannel, LeasedBlocks, Memory, PullRpc
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import KvLayout

log = logging.getLogger(__name__)


def make_channel(
    cfg: TransportConfig,
    memory: KvMemory | Memory,
    leases: LeasedBlocks,
    host: str,
    port: int,
    pull_rpc: PullRpc | None = None,
    layout: Callable[[], KvLayout] | None = None,
) -> PullQueue:
    """The configured byte path between `memory` and peers, measured, its pulls in turns by priority.

    It listens on host:port (0: any) once started.
    `layout` is asked for that of the memory when a receiver wants it in another dtype; None: there is no way to know.
    Raises ConfigError where the byte path cannot work here.
    """
    from sagellm_common.comm_backend.telemetry import InstrumentedChannel, InstrumentedLeases

    encode = None
    if layout is not None:
        encode = Encoder(memory if callable(memory) else lambda: memory, layout)
    end = End(cfg, memory, leases, host, port, pull_rpc, encode)
    measured = replace(end, leases=InstrumentedLeases(leases, cfg.backend, end.ask))
    channel = load(cfg.backend).open_channel(measured)
    if not channel.encodes and cfg.wire_dtype not in ("same", "auto"):
        raise ConfigError(
            f"transport.wire_dtype: {cfg.wire_dtype!r} needs a byte path whose source converts; {channel.name} sends "
            "blocks as they are: set transport.backend to 'tcp', or wire_dtype to 'same'"
        )
    if not channel.encodes and cfg.wire_dtype == "auto":
        log.info(
            "KV crosses in the dtype it has: over %s, transport.wire_dtype auto finds nothing to choose", channel.name
        )
    return PullQueue(InstrumentedChannel(channel), cfg.max_pulls, cfg.max_waiting_pulls)


def overlap_min_bytes(cfg: TransportConfig, channel: KVTransferChannel) -> int | None:
    """From how much KV on a prompt is handed over while it is computed; None: never. Says which, once, in the log."""
    if cfg.overlap == "off":
        log.info("KV is pulled after prefill: transport.overlap is off")
        return None
    if not channel.pulls_along:
        log.info("KV is pulled after prefill: over %s it cannot be pulled while it is computed", channel.name)
        return None
    log.info("KV of at least %d bytes is pulled while it is computed", cfg.overlap_min_bytes)
    return cfg.overlap_min_bytes
