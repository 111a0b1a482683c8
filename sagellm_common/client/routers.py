"""Routers of one cluster, any of which will do: one is used until it is lost, then the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_common.core.errors import ConfigError
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2_grpc, topology_pb2_grpc
from sagellm_common.rpc.inference_session import InferenceSession


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    address: str
    inference: inference_pb2_grpc.InferenceServiceStub
    topology: topology_pb2_grpc.TopologyServiceStub
    session: InferenceSession


class Routers:
    """`addresses` are host:port, several with commas between them. The caller closes `channels`."""

    def __init__(self, addresses: str, channels: ChannelPool, session: Choice) -> None:
        """Raises ConfigError."""
        named = [address.strip() for address in addresses.split(",")]
        if not all(named) or len({*named}) < len(named):
            raise ConfigError(f"router addresses {addresses!r}: must be host:port, all different, commas between them")
        self._all = [_router(address, channels, session) for address in named]
        self._current = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def current(self) -> Router:
        return self._all[self._current]

    @property
    def in_turn(self) -> Sequence[Router]:
        """All of them, the current one first."""
        return [*self._all[self._current :], *self._all[: self._current]]

    def lost(self, router: Router) -> None:
        """Goes on to the next, unless somebody did already."""
        if router is self.current:
            self._current = (self._current + 1) % len(self._all)

    async def close(self) -> None:
        """Cancels the generations in flight. Idempotent."""
        for router in self._all:
            await router.session.close()


def _router(address: str, channels: ChannelPool, session: Choice) -> Router:
    channel = channels.get(address)
    return Router(
        address,
        inference_pb2_grpc.InferenceServiceStub(channel),
        topology_pb2_grpc.TopologyServiceStub(channel),
        InferenceSession(channel, address, session),
    )
