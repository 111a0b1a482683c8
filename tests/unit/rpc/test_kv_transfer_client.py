"""What a receiver is told by a source that takes calls and then says nothing."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from sagellm_common.core.errors import PeerLost
from sagellm_common.core.types import KvSource
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from tests.support.topology import LAYOUT


class Silent(kv_pb2_grpc.KvTransferServiceServicer):
    async def Handshake(self, request: kv_pb2.HandshakeRequest, context: object) -> kv_pb2.HandshakeResponse:
        await asyncio.Event().wait()
        return kv_pb2.HandshakeResponse()


async def test_a_source_that_is_silent_is_lost_which_is_not_the_requests_deadline() -> None:
    server = grpc.aio.server()
    kv_pb2_grpc.add_KvTransferServiceServicer_to_server(Silent(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    source = KvSource("t", 1, "prefill-0", "i1", address, address, "tcp", np.zeros(1, dtype=np.int32), 0, 0)
    try:
        async with ChannelPool() as channels:
            await asyncio.wait_for(channels.get(address).channel_ready(), 30)
            client = KvTransferClient(channels, timeout_s=0.1)
            with pytest.raises(PeerLost, match=r"'prefill-0' was silent for 0\.1 s"):
                await client.handshake(source, worker_id="decode-0", incarnation="i2", layout=LAYOUT)
    finally:
        await server.stop(None)
