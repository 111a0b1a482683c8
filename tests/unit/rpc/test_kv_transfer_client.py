"""What a receiver is told by a source that takes connections and then says nothing."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from sagellm_common.core.errors import PeerLost
from sagellm_common.core.types import KvSource
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from tests.support.topology import LAYOUT


async def test_a_source_that_is_silent_is_lost_which_is_not_the_requests_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        blocks = np.zeros(1, dtype=np.int32)
        source = KvSource("t", 1, "prefill-0", "i1", address, address, "tcp", blocks, 0, 0)
        async with ChannelPool() as channels:
            client = KvTransferClient(channels, timeout_s=0.1)
            with pytest.raises(PeerLost, match=r"'prefill-0' was silent for 0\.1 s"):
                await client.handshake(source, worker_id="decode-0", incarnation="i2", layout=LAYOUT)
