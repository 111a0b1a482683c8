"""The TCP byte path: scatter/gather between the two sides' KV memory, asked for in band."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from sagellm_common.comm_backend.backends import End
from sagellm_common.comm_backend.backends.tcp_receiver import TcpReceiver
from sagellm_common.comm_backend.backends.tcp_source import TcpSource
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.protocol import Encode, Encoding, LeasedBlocks, Memory, TransferResult
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource

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


class TcpChannel:
    """A `KVTransferChannel`. `silence_s` bounds each wait for a peer, a pull's own timeout the whole of it."""

    name = "tcp"
    pulls_along = True
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
        self.address = ""
        self._host, self._port = host, port
        self._source = TcpSource(memory, leases, silence_s, messages.settings, encode)
        self._receiver = TcpReceiver(memory, digest=digest, silence_s=silence_s, messages=messages)

    async def start(self) -> str:
        self.address = self._source.start(self._host, self._port)
        return self.address

    async def pull(
        self,
        source: KvSource,
        source_blocks: BlockIds,
        target_blocks: BlockIds,
        *,
        timeout_s: float,
        into: KvMemory | None = None,
        encoding: Encoding | None = None,
    ) -> TransferResult:
        return await self._receiver.pull(
            source, source_blocks, target_blocks, timeout_s=timeout_s, into=into, encoding=encoding
        )

    async def pull_along(
        self,
        source: KvSource,
        first_block: int,
        target_blocks: BlockIds,
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None],
        into: KvMemory | None = None,
        encoding: Encoding | None = None,
    ) -> TransferResult:
        return await self._receiver.pull_along(
            source,
            first_block,
            target_blocks,
            timeout_s=timeout_s,
            on_bytes=on_bytes,
            into=into,
            encoding=encoding,
        )

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        raise InvalidRequest("KvTransferService.Pull is for byte paths like gloo; over tcp the receiver asks in band")

    async def close(self) -> None:
        await self._receiver.close()
        await asyncio.to_thread(self._source.close)
