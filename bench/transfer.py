"""GB/s of each byte path between two processes, beside a plain copy in memory: `python -m bench.transfer`.

KV-like: randomly permuted blocks of a pool twice as large, on both sides, to the end of the pull, digests on. Rounds
are interleaved, so that a noisy machine is noisy for all; medians, best in brackets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection

import numpy as np

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.protocol import KVTransferChannel
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.types import BlockIds, KvLayout, KvSource
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.kv_transfer_service import KvTransferServicer
from sagellm_common.rpc.server import GrpcServer, Registrar

HOST = "127.0.0.1"
LEASE_TTL_S = 3600.0
TIMEOUT_S = 60.0


def a_region(num_blocks: int, block_bytes: int) -> KvRegion:
    data = np.random.default_rng(0).integers(0, 256, num_blocks * block_bytes, dtype=np.uint8)
    return KvRegion(data.data, block_bytes, num_blocks)


def run_source(pipe: Connection, backend: str, num_blocks: int, block_bytes: int, digest: bool) -> None:
    asyncio.run(_serve(pipe, backend, num_blocks, block_bytes, digest))


async def _serve(pipe: Connection, backend: str, num_blocks: int, block_bytes: int, digest: bool) -> None:
    leases = HandoffSource(LEASE_TTL_S, SystemClock(), lambda _: None)
    leases.pin("bench", 1, Allocation(np.arange(num_blocks, dtype=np.int32)), 0)
    async with ChannelPool() as channels:
        config = TransportConfig(backend=backend, digest=digest)
        region = a_region(num_blocks, block_bytes)
        channel = make_channel(config, region, leases, HOST, 0, KvTransferClient(channels).pull_rpc)
        data_address = await channel.start()
        layout = KvLayout("bench", "uint8", 1, 1, 1, 1, block_bytes)
        servicer = KvTransferServicer(leases, channel, layout, "source", "source-1")
        add = kv_pb2_grpc.add_KvTransferServiceServicer_to_server
        server = GrpcServer(f"{HOST}:0", [Registrar("sagellm.v1.KvTransferService", add, servicer)])
        pipe.send((f"{HOST}:{await server.start()}", data_address))
        # Until the parent closes its end.
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(pipe.recv)
        await server.stop(0.0)
        await channel.close()


@contextlib.asynccontextmanager
async def a_pair(
    backend: str, region: KvRegion, digest: bool, channels: ChannelPool
) -> AsyncIterator[tuple[KVTransferChannel, KvSource]]:
    """A receiver into `region`, and a source process for it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    args = (theirs, backend, region.num_blocks, region.block_bytes, digest)
    process = spawn.Process(target=run_source, args=args, daemon=True)
    process.start()
    theirs.close()
    control_address, data_address = await asyncio.to_thread(ours.recv)
    config = TransportConfig(backend=backend, digest=digest)
    leases = HandoffSource(LEASE_TTL_S, SystemClock(), lambda _: None)
    channel = make_channel(config, region, leases, HOST, 0, KvTransferClient(channels).pull_rpc)
    table = np.arange(region.num_blocks, dtype=np.int32)
    source = KvSource("bench", 1, "source", "1", control_address, data_address, backend, table, 0, 0)
    try:
        yield channel, source
    finally:
        await channel.close()
        ours.close()
        await asyncio.to_thread(process.join)


def copy(source: KvRegion, target: KvRegion, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
    """What no byte path can beat: block by block within one process."""
    for from_block, to_block in zip(source_blocks.tolist(), target_blocks.tolist(), strict=True):
        target.block(to_block)[:] = source.block(from_block)


async def measure(block_bytes: int, total_bytes: int, rounds: int, digest: bool) -> dict[str, list[float]]:
    """Seconds per round, by name."""
    num_blocks = 2 * total_bytes // block_bytes
    region, other = a_region(num_blocks, block_bytes), a_region(num_blocks, block_bytes)
    seconds: dict[str, list[float]] = {"tcp": [], "gloo": [], "copy": []}
    async with (
        ChannelPool() as channels,
        a_pair("tcp", region, digest, channels) as tcp,
        a_pair("gloo", region, digest, channels) as gloo,
    ):
        for turn in range(rounds + 1):
            rng = np.random.default_rng(turn)
            blocks = [rng.permutation(num_blocks)[: num_blocks // 2].astype(np.int32) for _ in range(2)]
            for name, (channel, source) in (("tcp", tcp), ("gloo", gloo)):
                began = time.perf_counter()
                await channel.pull(source, blocks[0], blocks[1], timeout_s=TIMEOUT_S)
                seconds[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            copy(other, region, blocks[0], blocks[1])
            seconds["copy"].append(time.perf_counter() - began)
    # The first round connects and touches memory.
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--total-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-digest", action="store_true")
    args = parser.parse_args()
    total = args.total_mib << 20
    print(f"{args.total_mib} MiB, {args.rounds} rounds, digest {'off' if args.no_digest else 'on'}; GB/s median (best)")
    for block_kib in (16, 256, 1024):
        measured = asyncio.run(measure(block_kib << 10, total, args.rounds, not args.no_digest))
        cells = [
            f"{n} {total / statistics.median(s) / 1e9:.2f} ({total / min(s) / 1e9:.2f})" for n, s in measured.items()
        ]
        print(f"{block_kib:5d} KiB blocks   " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
