"""The RDMA byte path: Mooncake's, over InfiniBand or RoCE instead of TCP."""

from __future__ import annotations

from pathlib import Path

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.mooncake import MooncakeChannel
from sagellm_common.core.errors import ConfigError

DEVICES = Path("/sys/class/infiniband")


def open_channel(end: End) -> MooncakeChannel:
    """Raises ConfigError where there is no RDMA device: the engine would take TCP instead, and say nothing."""
    if not (DEVICES.is_dir() and any(DEVICES.iterdir())):
        raise ConfigError(
            f"transport.backend: 'rdma' found no RDMA device in {DEVICES}; load the driver of the NIC (mlx5_ib, "
            "rdma_rxe for any NIC), in a container pass /dev/infiniband too, or use 'mooncake', which needs TCP only"
        )
    return MooncakeChannel("rdma", "rdma", end)
