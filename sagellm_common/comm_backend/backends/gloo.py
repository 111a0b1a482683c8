"""The Gloo byte path, between hosts' memory, and groups over Gloo."""

from __future__ import annotations

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.pair_channel import PairChannel, open_pairs
from sagellm_common.comm_backend.backends.torch_group import TorchComm
from sagellm_common.comm_backend.backends.torch_pair import HostStaging


def open_channel(end: End) -> PairChannel:
    """Raises ConfigError without `pull_rpc`."""
    return open_pairs("gloo", end, HostStaging())


def open_comm(host: str, port: int) -> TorchComm:
    return TorchComm("gloo", host, port)
