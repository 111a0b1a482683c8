"""Gloo and Mooncake as their own manuals use them, on the same blocks: what our byte paths are compared with. And a
socket, for one block at a time: what this machine needs for a round trip between two processes.

Both are spared what a byte path does besides moving bytes: no lease, no digest, no deadline, and Gloo's list of blocks
comes over a pipe. `gloo`: an isend and an irecv for each block. `mooncake`: batched reads straight between the pools,
at most 512 blocks a call, for a call with more of them fails.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
import threading
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # not in __all__

from bench.benchmarks.transfer.blocks import HOST
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds

SOURCE, RECEIVER = 0, 1
LIMIT = timedelta(seconds=60)
MAX_READS = 512


def _rows(region: KvRegion) -> list[torch.Tensor]:
    """A tensor for each block of the pool, without a copy."""
    return list(torch.from_numpy(np.frombuffer(region.view, np.uint8)).view(region.num_blocks, region.block_bytes))


def _group(store: TCPStore, rank: int) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout = LIMIT
    return ProcessGroupGloo(PrefixStore("plain", store), rank, 2, options)


def serve_gloo(pipe: Connection, region: KvRegion) -> None:
    """On a thread of its own: sends the blocks whose numbers come through the pipe, until that is closed."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=LIMIT)

    def serve() -> None:
        try:
            pipe.send(store.port)
            group, rows = _group(store, SOURCE), _rows(region)
            while True:
                ids = np.frombuffer(pipe.recv_bytes(), np.int32).tolist()
                for work in [group.send([rows[block]], RECEIVER, 0) for block in ids]:
                    work.wait(LIMIT)
        except EOFError:
            return

    threading.Thread(target=serve, name="plain-gloo", daemon=True).start()


class PlainGloo:
    name = "plain gloo"

    def __init__(self, pipe: Connection, region: KvRegion) -> None:
        self._pipe = pipe
        store = TCPStore(HOST, pipe.recv(), is_master=False, wait_for_workers=False, timeout=LIMIT)
        self._group, self._rows = _group(store, RECEIVER), _rows(region)

    async def pull(self, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        await asyncio.to_thread(self._pull, source_blocks, target_blocks.tolist())

    def _pull(self, source_blocks: BlockIds, targets: Sequence[int]) -> None:
        self._pipe.send_bytes(source_blocks.tobytes())
        for work in [self._group.recv([self._rows[block]], SOURCE, 0) for block in targets]:
            work.wait(LIMIT)


_ASKED = struct.Struct("<q")


def serve_tcp(region: KvRegion) -> int:
    """On a thread of its own: whoever connects to the port names a block and gets its bytes, until it closes."""
    listener = socket.create_server((HOST, 0))

    def serve() -> None:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with listener, sock:
            while asked := sock.recv(_ASKED.size):
                sock.sendall(region.block(_ASKED.unpack(asked)[0]))

    threading.Thread(target=serve, name="plain-tcp", daemon=True).start()
    return int(listener.getsockname()[1])


class PlainTcp:
    """A blocking call each way, on the event loop; no lease, no digest, no deadline."""

    name = "plain tcp"

    def __init__(self, port: int, region: KvRegion) -> None:
        self._sock = socket.create_connection((HOST, port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._region = region

    async def pull(self, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        for theirs, ours in zip(source_blocks.tolist(), target_blocks.tolist(), strict=True):
            self._sock.sendall(_ASKED.pack(theirs))
            self._sock.recv_into(self._region.block(ours), 0, socket.MSG_WAITALL)

    def close(self) -> None:
        self._sock.close()


def mooncake_engine(region: KvRegion) -> tuple[Any, str, int]:
    """(engine, what others call it, address of the region), the region registered. Raises ImportError, OSError."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ["MC_FORCE_TCP"] = "1"
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
        raise OSError("Mooncake's Transfer Engine does not start")
    address = np.frombuffer(region.view, np.uint8).ctypes.data
    if engine.register_memory(address, len(region.view)):
        raise OSError(f"Mooncake's Transfer Engine does not register {len(region.view)} bytes")
    return engine, f"{HOST}:{engine.get_rpc_port()}", address


class PlainMooncake:
    name = "plain mooncake"

    def __init__(self, peer: str, peer_address: int, region: KvRegion) -> None:
        self._engine, _, self._address = mooncake_engine(region)
        self._peer, self._peer_address, self._size = peer, peer_address, region.block_bytes

    async def pull(self, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        await asyncio.to_thread(self._pull, source_blocks.tolist(), target_blocks.tolist())

    def _pull(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        size = self._size
        for at in itertools.count(0, MAX_READS):
            mine = [self._address + block * size for block in targets[at : at + MAX_READS]]
            theirs = [self._peer_address + block * size for block in sources[at : at + MAX_READS]]
            if not mine:
                return
            if self._engine.batch_transfer_sync_read(self._peer, mine, theirs, [size] * len(mine)):
                raise OSError("plain Mooncake could not read")
