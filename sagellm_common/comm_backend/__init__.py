"""KV bytes between workers: the handoff's leases and the byte paths that read and write under them."""

from __future__ import annotations

import logging

from sagellm_common.comm_backend.protocol import KVTransferChannel, LeasedBlocks, Memory, PullRpc
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory, KvRegion

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

    Raises ConfigError for gloo without `pull_rpc`, for there the source has to act for each pull, and with memory that
    is not the host's, for it copies in place.
    """
    from sagellm_common.comm_backend.telemetry import InstrumentedChannel, InstrumentedLeases

    ask: Memory = memory if callable(memory) else lambda: memory
    leases = InstrumentedLeases(leases, cfg.backend, ask)
    channel: KVTransferChannel
    if cfg.backend == "tcp":
        from sagellm_common.comm_backend.backends.tcp import TcpChannel

        channel = TcpChannel(ask, leases, host, port, digest=cfg.digest, silence_s=cfg.timeout_s)
    else:
        # torch.distributed takes a second to import: only where it is used.
        from sagellm_common.comm_backend.backends.gloo import GlooChannel

        if pull_rpc is None:
            raise ConfigError("transport.backend=gloo needs a pull_rpc: the source takes part in each pull")

        def in_place() -> KvRegion:
            region = ask()
            if not isinstance(region, KvRegion):
                raise ConfigError(
                    "transport.backend: 'gloo' moves KV of host memory only; use 'tcp', which stages a device's"
                )
            return region

        if not callable(memory):
            in_place()  # a mistake is told at the start
        channel = GlooChannel(in_place, leases, host, port, pull_rpc, digest=cfg.digest, silence_s=cfg.timeout_s)
    return InstrumentedChannel(channel)


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
