"""Groups of GPUs over NCCL, formed on demand."""

from __future__ import annotations

import torch

from sagellm_common.comm_backend.backends.torch_group import TorchComm
from sagellm_common.core.errors import ConfigError


def open_comm(host: str, port: int) -> TorchComm:
    """Raises ConfigError without a GPU, or a torch that can use it."""
    if not torch.distributed.is_nccl_available():
        raise ConfigError(f"collectives: 'nccl' needs a CUDA build of torch, this is {torch.__version__}; use 'gloo'")
    if not torch.cuda.is_available():
        raise ConfigError("collectives: 'nccl' found no GPU (torch.cuda.is_available()); see `sagellm devices`")
    return TorchComm("nccl", host, port, device="cuda")
