"""A byte path over stream sockets as a channel: its source and its receiver side by side."""

from __future__ import annotations

import asyncio

from sagellm_common.comm_backend.backends.socket_receiver import SocketReceiver
from sagellm_common.comm_backend.backends.socket_source import SocketSource
from sagellm_common.comm_backend.protocol import Pull, PullAlong, TransferResult
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import BlockIds


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

    async def pull(self, asked: Pull) -> TransferResult:
        return await self._receiver.pull(asked)

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        return await self._receiver.pull_along(asked)

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        raise InvalidRequest(
            f"KvTransferService.Pull is for byte paths like gloo; over {self.name} the receiver asks in band"
        )

    async def close(self) -> None:
        await self._receiver.close()
        await asyncio.to_thread(self._source.close)
