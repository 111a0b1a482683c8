"""The byte path of one host: the receiver copies blocks out of the source's memory, once, while the source holds them.

    source   pool in a memory file ──────── its descriptor, over a Unix socket ───────► mapped, read-only   receiver
                   ▲                                                                        │
                   └─ lease ◄─── "these blocks" … "copied" … digests, "held until here" ───►└─copy─► own pool

A little of it comes through the socket after all, in one round trip instead of two.

What a socket would carry twice, into the kernel and out of it, is copied once. Where the source's memory is no file,
the receiver reads it with process_vm_readv, which needs ptrace rights and a PID namespace in common.
"""

from __future__ import annotations

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.shm_receiver import ShmReceiver
from sagellm_common.comm_backend.backends.shm_source import ShmSource
from sagellm_common.comm_backend.backends.socket_channel import SocketChannel
from sagellm_common.comm_backend.backends.socket_receiver import SMALL_BYTES
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.protocol import LeasedBlocks, Regions


def open_channel(end: End) -> ShmChannel:
    """Raises ConfigError for memory that is not the host's."""
    cfg = end.config
    return ShmChannel(end.in_place(), end.leases, digest=cfg.digest, silence_s=cfg.timeout_s, messages=end.planner())


class ShmChannel(SocketChannel):
    """`silence_s` bounds each wait for a peer, a pull's own timeout the whole of it."""

    def __init__(
        self,
        memory: Regions,
        leases: LeasedBlocks,
        *,
        digest: bool,
        silence_s: float,
        messages: MessagePlanner,
        inline_bytes: int = SMALL_BYTES,
    ) -> None:
        super().__init__(
            "shm",
            ShmSource(memory, leases, silence_s, messages.settings),
            ShmReceiver(memory, digest=digest, silence_s=silence_s, messages=messages, inline_bytes=inline_bytes),
        )
