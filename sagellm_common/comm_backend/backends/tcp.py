"""The TCP byte path: scatter/gather between the two sides' KV memory, asked for in band."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.socket_channel import SocketChannel
from sagellm_common.comm_backend.backends.tcp_receiver import TcpReceiver
from sagellm_common.comm_backend.backends.tcp_source import TcpSource
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.protocol import Encode, LeasedBlocks, Memory

if TYPE_CHECKING:
    from sagellm_common.comm_backend.backends.tcp_group import TcpComm


def open_channel(end: End) -> TcpChannel:
    cfg = end.config
    return TcpChannel(
        end.ask,
        end.leases,
        end.host,
        end.port,
        digest=cfg.digest,
        silence_s=cfg.timeout_s,
        messages=end.planner(),
        encode=end.encode,
    )


def open_comm(host: str, port: int) -> TcpComm:
    from sagellm_common.comm_backend.backends.tcp_group import TcpComm  # imports torch

    return TcpComm(host, port)


class TcpChannel(SocketChannel):
    """`silence_s` bounds each wait for a peer, a pull's own timeout the whole of it."""

    encodes = True

    def __init__(
        self,
        memory: Memory,
        leases: LeasedBlocks,
        host: str,
        port: int,
        *,
        digest: bool,
        silence_s: float,
        messages: MessagePlanner,
        encode: Encode | None = None,
    ) -> None:
        super().__init__(
            "tcp",
            TcpSource(memory, leases, silence_s, host, port, messages.settings, encode),
            TcpReceiver(memory, digest=digest, silence_s=silence_s, messages=messages),
        )
