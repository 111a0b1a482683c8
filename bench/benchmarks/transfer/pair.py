"""The two processes: this one receives, another has the blocks and serves them over every byte path at once."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.benchmarks.transfer.blocks import HOST, Contestant, MemoryCopy, Pool, cpu_seconds
from bench.benchmarks.transfer.plain import (
    PlainGloo,
    PlainMooncake,
    PlainTcp,
    mooncake_engine,
    serve_gloo,
    serve_tcp,
)
from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.protocol import KVTransferChannel, Pull
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.types import BlockIds, KvLayout, KvSource
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from sagellm_common.rpc.kv_transfer_service import KvTransferServicer
from sagellm_common.rpc.server import GrpcServer, Registrar

LEASE_TTL_S = 3600.0
TIMEOUT_S = 60.0
NO_DIGEST = ", no digest"


@dataclass(frozen=True, slots=True)
class Offer:
    """What the source process says of one byte path: where it is, or why it is not."""

    backend: str
    digest: bool
    control_address: str = ""
    data_address: str = ""
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Opening:
    """What the source process offers in all, said once."""

    offers: tuple[Offer, ...]
    mooncake: tuple[str, int] | str
    """(engine, address of the pool), or why there is none."""
    tcp_port: int


def _leases(num_blocks: int) -> HandoffSource:
    leases = HandoffSource(LEASE_TTL_S, SystemClock(), lambda _: None)
    leases.pin("bench", 1, Allocation(np.arange(num_blocks, dtype=np.int32)), 0)
    return leases


def run_source(pipe: Connection, gloo_pipe: Connection, pool: Pool, backends: Sequence[str], plain: bool) -> None:
    asyncio.run(_serve(pipe, gloo_pipe, pool, backends, plain))


async def _serve(pipe: Connection, gloo_pipe: Connection, pool: Pool, backends: Sequence[str], plain: bool) -> None:
    region = pool.region(filled=True)
    async with contextlib.AsyncExitStack() as stack:
        channels = await stack.enter_async_context(ChannelPool())
        offers = [await _offer(b, digest, region, channels, stack) for b in backends for digest in (True, False)]
        engine, mooncake = _mooncake(region) if plain else (None, "not asked for")
        pipe.send(Opening(tuple(offers), mooncake, serve_tcp(region) if plain else 0))
        if plain:
            serve_gloo(gloo_pipe, region)
        # Until the parent closes its end; the engine serves as long as it is referred to.
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(pipe.recv)
        del engine


def _mooncake(region: KvRegion) -> tuple[Any, tuple[str, int] | str]:
    """The engine, and what `Opening` says of it."""
    try:
        engine, session, address = mooncake_engine(region)
    except (ImportError, OSError) as err:
        return None, str(err)
    return engine, (session, address)


async def _offer(
    backend: str, digest: bool, region: KvRegion, channels: ChannelPool, stack: contextlib.AsyncExitStack
) -> Offer:
    leases = _leases(region.num_blocks)
    config = TransportConfig(backend=backend, digest=digest)  # type: ignore[arg-type]  # pydantic checks it
    try:
        channel = make_channel(config, region, leases, HOST, 0, KvTransferClient(channels).pull_rpc)
        data_address = await channel.start()
    except ConfigError as err:
        return Offer(backend, digest, missing=err.message)
    stack.push_async_callback(channel.close)
    layout = KvLayout("bench", "uint8", 1, 1, 1, 1, region.block_bytes)
    servicer = KvTransferServicer(leases, channel, layout, "source", "source-1")
    add = kv_pb2_grpc.add_KvTransferServiceServicer_to_server
    server = GrpcServer(f"{HOST}:0", [Registrar("sagellm.v1.KvTransferService", add, servicer)])
    address = f"{HOST}:{await server.start()}"
    stack.push_async_callback(server.stop, 0.0)
    return Offer(backend, digest, address, data_address)


@dataclass(slots=True)
class BytePath:
    """One of our byte paths, as a decode worker uses it."""

    name: str
    channel: KVTransferChannel
    source: KvSource

    async def pull(self, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
        await self.channel.pull(Pull(self.source, source_blocks, target_blocks, timeout_s=TIMEOUT_S))


@dataclass(slots=True)
class Pair:
    """Both ends, for as long as `a_pair` lasts. `missing` says of who is not there why."""

    region: KvRegion
    reference: KvRegion
    """The source's bytes."""
    source_cpu_s: Callable[[], float]
    signal_source: Callable[[int], None]
    contestants: list[Contestant] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    floor: list[Contestant] = field(default_factory=list)
    """For one block at a time."""


@contextlib.asynccontextmanager
async def a_pair(pool: Pool, backends: Sequence[str], *, plain: bool = True) -> AsyncIterator[Pair]:
    """Without `plain` only the byte paths are there, and the copy within one process."""
    spawn = multiprocessing.get_context("spawn")
    (ours, theirs), (gloo_pipe, gloo_source) = spawn.Pipe(), spawn.Pipe()
    process = spawn.Process(target=run_source, args=(theirs, gloo_source, pool, backends, plain), daemon=True)
    process.start()
    theirs.close()
    gloo_source.close()
    pid = process.pid
    assert pid is not None
    region, reference = pool.region(filled=False), pool.region(filled=True)
    try:
        opening: Opening = await asyncio.to_thread(ours.recv)
    except EOFError:
        raise RuntimeError("the process with the blocks died before it served; what it said is above") from None
    pair = Pair(
        region, reference, cpu_seconds(pid), lambda number: os.kill(pid, number), [MemoryCopy(reference, region)]
    )
    async with contextlib.AsyncExitStack() as stack:
        channels = await stack.enter_async_context(ChannelPool())
        for offer in opening.offers:
            name = offer.backend + ("" if offer.digest else NO_DIGEST)
            try:
                if offer.missing:
                    raise ConfigError(offer.missing)
                pair.contestants.append(_byte_path(name, offer, region, channels, stack))
            except ConfigError as err:
                pair.missing[offer.backend] = err.message
        if plain:
            pair.contestants.append(await asyncio.to_thread(PlainGloo, gloo_pipe, region))
            tcp = PlainTcp(opening.tcp_port, region)
            stack.callback(tcp.close)
            pair.floor.append(tcp)
        if isinstance(opening.mooncake, tuple):
            pair.contestants.append(PlainMooncake(*opening.mooncake, region))
        elif plain:
            pair.missing[PlainMooncake.name] = opening.mooncake
        try:
            yield pair
        finally:
            ours.close()
            gloo_pipe.close()
            await asyncio.to_thread(process.join, 10.0)
            process.kill()


def _byte_path(
    name: str, offer: Offer, region: KvRegion, channels: ChannelPool, stack: contextlib.AsyncExitStack
) -> BytePath:
    config = TransportConfig(backend=offer.backend, digest=offer.digest)  # type: ignore[arg-type]
    pull_rpc = KvTransferClient(channels).pull_rpc
    channel = make_channel(config, region, _leases(region.num_blocks), HOST, 0, pull_rpc)
    stack.push_async_callback(channel.close)
    table = np.arange(region.num_blocks, dtype=np.int32)
    source = KvSource("bench", 1, "source", "1", offer.control_address, offer.data_address, offer.backend, table, 0, 0)
    return BytePath(name, channel, source)
