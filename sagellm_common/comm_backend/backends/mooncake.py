"""The Mooncake byte path: the receiver reads the source's blocks through Mooncake's Transfer Engine.

    receiver  pull ──► request ──────────────────────────► lease held; where the blocks are, their digests
                       engine reads into a staging slot ◄───────────────┤ (the source's CPU only answers its engine)
                       slot → own blocks, group by group                │
                       all read ─────────────────────────► lease was held until here

The request travels on a connection of its own (`mooncake_source`): it ends when the source dies, which the engine
would notice late, and while it lives the source holds the lease. Why there is a staging slot: `mooncake_engine`.

Engines let whoever can connect to their ports read and write the pool, without a lease: for trusted networks only.
"""

from __future__ import annotations

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.mooncake_engine import acquire, release
from sagellm_common.comm_backend.backends.mooncake_receiver import MooncakeReceiver
from sagellm_common.comm_backend.backends.mooncake_source import MooncakeSource
from sagellm_common.comm_backend.backends.socket_channel import SocketChannel


def open_channel(end: End) -> MooncakeChannel:
    """Raises ConfigError where the engine is not installed, or cannot be loaded."""
    return MooncakeChannel("tcp", "mooncake", end)


class MooncakeChannel(SocketChannel):
    """`transport.timeout_s` bounds each wait for a peer, a pull's own timeout the whole of it."""

    def __init__(self, protocol: str, name: str, end: End) -> None:
        cfg, regions, messages = end.config, end.in_place(), end.planner()
        self._engine = acquire(protocol, end.host)
        self._closed = False
        silence_s = cfg.timeout_s
        super().__init__(
            name,
            MooncakeSource(regions, end.leases, silence_s, end.host, end.port, self._engine, messages.settings),
            MooncakeReceiver(self._engine, regions, digest=cfg.digest, silence_s=silence_s, messages=messages),
        )

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await super().close()
            release(self._engine)
