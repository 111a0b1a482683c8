"""A byte path over stream sockets as a channel: its source and its receiver side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sagellm_common.comm_backend.backends.socket_receiver import SocketReceiver
from sagellm_common.comm_backend.backends.socket_source import SocketSource
from sagellm_common.comm_backend.protocol import Encoding, TransferResult
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockIds, KvSource


class SocketChannel:
    """A `KVTransferChannel`."""

    pulls_along = True
    encodes = False

    def __init__(self, name: str, source: SocketSource, receiver: SocketReceiver) -> None:
        self.name = name
        self.address = ""
        self._source = source
        self._receiver = receiver

    async def start(self) -> str:
        self.address = self._source.start()
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
        raise InvalidRequest(
            f"KvTransferService.Pull is for byte paths like gloo; over {self.name} the receiver asks in band"
        )

    async def close(self) -> None:
        await self._receiver.close()
        await asyncio.to_thread(self._source.close)
