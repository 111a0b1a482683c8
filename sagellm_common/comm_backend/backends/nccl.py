"""The NCCL byte path, between GPUs, and groups over NCCL."""

from __future__ import annotations

import torch

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.nccl_staging import DeviceStaging
from sagellm_common.comm_backend.backends.pair_channel import PairChannel, open_pairs
from sagellm_common.comm_backend.backends.torch_group import TorchComm
from sagellm_common.core.errors import ConfigError


def open_channel(end: End) -> PairChannel:
    """Pairs on this process's current GPU. Raises ConfigError without one, and without `pull_rpc`."""
    _check("transport.backend", "tcp")
    return open_pairs("nccl", end, DeviceStaging(torch.device("cuda", torch.cuda.current_device())))


def open_comm(host: str, port: int) -> TorchComm:
    """Raises ConfigError without a GPU, or a torch that can use it."""
    _check("collectives", "gloo")
    return TorchComm("nccl", host, port, device="cuda")


def _check(key: str, instead: str) -> None:
    if not torch.distributed.is_nccl_available():
        raise ConfigError(f"{key}: 'nccl' needs a CUDA build of torch, this is {torch.__version__}; use {instead!r}")
    if not torch.cuda.is_available():
        raise ConfigError(f"{key}: 'nccl' found no GPU (torch.cuda.is_available()); see `sagellm devices`")
