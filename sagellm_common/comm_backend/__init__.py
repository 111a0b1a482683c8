"""KV bytes between workers: the handoff's leases and the byte paths that read and write under them."""

from __future__ import annotations

import logging
from dataclasses import replace

from sagellm_common.comm_backend.backends import End, load
from sagellm_common.comm_backend.protocol import KVTransferChannel, LeasedBlocks, Memory, PullRpc
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.kv import KvMemory

log = logging.getLogger(__name__)


def make_channel(
    cfg: TransportConfig,
    memory: KvMemory | Memory,
    leases: LeasedBlocks,
    host: str,
    port: int,
    pull_rpc: PullRpc | None = None,
) -> KVTransferChannel:
    """The configured byte path between `memory` and peers, measured. It listens on host:port (0: any) once started.

    Raises ConfigError where the byte path cannot work here.
    """
    from sagellm_common.comm_backend.telemetry import InstrumentedChannel, InstrumentedLeases

    end = End(cfg, memory, leases, host, port, pull_rpc)
    measured = replace(end, leases=InstrumentedLeases(leases, cfg.backend, end.ask))
    return InstrumentedChannel(load(cfg.backend).open_channel(measured))


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
