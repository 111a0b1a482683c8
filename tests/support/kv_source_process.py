"""A source of KV blocks as a process of its own, to be killed or stopped half-way through a pull.

    python -m tests.support.kv_source_process BACKEND PAUSE_AT [HOST]

Prints one JSON line when it serves, and `paused` when it has come to step PAUSE_AT of sending, where it stays.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import BlockIds, KvSource
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_service import KvTransferServicer
from sagellm_common.rpc.server import GrpcServer, Registrar
from tests.support.kv_channels import HOST, a_layout, random_region

NUM_BLOCKS, BLOCK_BYTES, SEED = 64, 256 << 10, 7


def pausing(step: Callable[..., Any], pause_at: int) -> Callable[..., Any]:
    calls = 0

    def stepped(*args: Any) -> Any:
        nonlocal calls
        if calls == pause_at:
            print("paused", flush=True)
            threading.Event().wait(60)
        calls += 1
        return step(*args)

    return stepped


def pause(backend: str, at: int) -> None:
    """At a group of blocks. gloo cuts a message for each, tcp sends it, the others take its digests beside that."""
    if backend == "tcp":
        from sagellm_common.comm_backend.backends import socket_source

        socket_source.blocks = pausing(socket_source.blocks, at)
    elif backend != "gloo":
        source = importlib.import_module(f"sagellm_common.comm_backend.backends.{backend}_source")
        source.block_digests = pausing(source.block_digests, at)
    else:
        from sagellm_common.comm_backend.backends.torch_pair import HostStaging

        HostStaging.take = pausing(HostStaging.take, at)  # type: ignore[method-assign]


async def serve(backend: str, host: str) -> None:
    region = random_region(NUM_BLOCKS, BLOCK_BYTES, SEED, in_file=True)
    leases = HandoffSource(60.0, SystemClock(), lambda _: None)
    leases.pin("t", 1, Allocation(np.arange(NUM_BLOCKS, dtype=np.int32)), 0)

    async def never(source: KvSource, blocks: BlockIds, pair_id: str, timeout_s: float) -> bytes:
        raise AssertionError("this process pulls nothing")

    config = TransportConfig(backend=backend, timeout_s=20.0)  # type: ignore[arg-type]
    channel = make_channel(config, region, leases, host, 0, never)
    data_address = await channel.start()
    servicer = KvTransferServicer(leases, channel, a_layout(BLOCK_BYTES), "source", "source-1")
    registrar = Registrar("sagellm.v1.KvTransferService", kv_pb2_grpc.add_KvTransferServiceServicer_to_server, servicer)
    server = GrpcServer(f"{host}:0", [registrar])
    port = await server.start()
    print(json.dumps({"address": f"{host}:{port}", "data_address": data_address}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if int(sys.argv[2]) >= 0:
        pause(sys.argv[1], int(sys.argv[2]))
    asyncio.run(serve(sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else HOST))
