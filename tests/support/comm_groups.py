"""Members of groups, all in this process, over each backend that has collectives."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
import torch

from sagellm_common.comm_backend.backends import COLLECTIVES, open_comm
from sagellm_common.comm_backend.backends.mock_group import MockComm, MockNet
from sagellm_common.comm_backend.protocol import CommBackendProtocol, CommGroup
from sagellm_common.core.errors import ConfigError

BACKENDS = (*COLLECTIVES, "mock")
HOST = "127.0.0.1"
TIMEOUT_S = 20.0
NUM_RANKS = 3


class Members:
    """Ends of one backend, which form groups of any of them."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.net = MockNet()
        self.ends: list[CommBackendProtocol] = []
        self._names = (f"group-{n}" for n in itertools.count())

    def device(self, rank: int) -> str:
        """NCCL wants a GPU for each rank."""
        return f"cuda:{rank}" if self.backend == "nccl" else "cpu"

    async def start(self, count: int) -> None:
        for _ in range(count):
            end = MockComm(self.net) if self.backend == "mock" else self._open()
            await end.start()
            self.ends.append(end)

    def _open(self) -> CommBackendProtocol:
        try:
            end = open_comm(self.backend, HOST, 0)
        except ConfigError as err:
            pytest.skip(err.message)
        if self.backend == "nccl" and (found := torch.cuda.device_count()) < NUM_RANKS:
            pytest.skip(f"nccl: {NUM_RANKS} ranks need as many GPUs, this machine has {found}")
        return end

    async def group(self, *which: int, timeout_s: float = TIMEOUT_S) -> list[CommGroup]:
        """One of these ends, in this order; all of them by default."""
        ends = [self.ends[n] for n in which] or self.ends
        name, addresses = next(self._names), [end.address for end in ends]
        return await asyncio.gather(*(end.join(name, addresses, timeout_s=timeout_s) for end in ends))

    async def close(self) -> None:
        for end in self.ends:
            await end.close()

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, rank: int = 0) -> torch.Tensor:
        """Random whole numbers below ten, where `rank` has its tensors."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 10, shape, generator=generator).to(dtype).to(self.device(rank))

    async def sent(self, group: list[CommGroup], tensor: torch.Tensor, source: int = 0, to: int = 1) -> torch.Tensor:
        """What rank `to` has received."""
        into = torch.zeros_like(tensor, device=self.device(to))
        await asyncio.gather(
            group[source].send(tensor, to, timeout_s=TIMEOUT_S), group[to].recv(into, source, timeout_s=TIMEOUT_S)
        )
        return into


def same(tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Wherever they are."""
    pairs = zip(tensors, expected, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


async def on_all(
    group: list[CommGroup], call: str, tensors: Sequence[torch.Tensor], *args: object, timeout_s: float = TIMEOUT_S
) -> list[object]:
    """What each rank got from the call with its tensor, errors included."""
    calls = (getattr(g, call)(tensors[g.rank], *args, timeout_s=timeout_s) for g in group)
    return await asyncio.gather(*calls, return_exceptions=True)
