"""KV bytes between workers: the handoff's leases and the byte paths that read and write under them."""

from __future__ import annotations

from sagellm_common.comm_backend.protocol import KVTransferChannel, LeasedBlocks, PullRpc, Regions
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvRegion


def make_channel(
    cfg: TransportConfig,
    region: KvRegion | Regions,
    leases: LeasedBlocks,
    host: str,
    port: int,
    pull_rpc: PullRpc | None = None,
) -> KVTransferChannel:
    """The configured byte path between `region` and peers, measured. It listens on host:port (0: any) once started.

    Raises ConfigError for gloo without `pull_rpc`: there the source has to act for each pull.
    """
    from sagellm_common.comm_backend.telemetry import InstrumentedChannel, InstrumentedLeases

    regions: Regions = (lambda: region) if isinstance(region, KvRegion) else region
    leases = InstrumentedLeases(leases, cfg.backend, regions)
    channel: KVTransferChannel
    if cfg.backend == "tcp":
        from sagellm_common.comm_backend.backends.tcp import TcpChannel

        channel = TcpChannel(regions, leases, host, port, digest=cfg.digest, silence_s=cfg.timeout_s)
    else:
        # torch.distributed takes a second to import: only where it is used.
        from sagellm_common.comm_backend.backends.gloo import GlooChannel

        if pull_rpc is None:
            raise ConfigError("transport.backend=gloo needs a pull_rpc: the source takes part in each pull")
        channel = GlooChannel(regions, leases, host, port, pull_rpc, digest=cfg.digest, silence_s=cfg.timeout_s)
    return InstrumentedChannel(channel)
