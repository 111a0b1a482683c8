"""What a receiver sees of a source process that dies or stops, over every byte path between processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.core.errors import LayoutMismatch, PeerLost
from sagellm_common.core.types import KvSource
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from tests.support.kv_channels import HOST, Cluster, Side, a_layout, blocks_of, missing, random_region
from tests.support.kv_source_process import BLOCK_BYTES, NUM_BLOCKS, SEED

BACKENDS = ("tcp", "shm", "gloo", "mooncake")
ALL = np.arange(NUM_BLOCKS, dtype=np.int32)


def at_steps(*steps: int, of_mooncake: int) -> pytest.MarkDecorator:
    """Over mooncake at one of them: where its source is in its answer makes no difference to the engines."""
    cases = [(b, step) for b in BACKENDS for step in steps if b != "mooncake" or step == of_mooncake]
    return pytest.mark.parametrize(("backend", "pause_at"), cases)


class SourceProcess:
    def __init__(self, process: asyncio.subprocess.Process, source: KvSource) -> None:
        self._process = process
        self.source = source

    async def paused(self) -> None:
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            assert (await self._process.stdout.readline()).strip() == b"paused"

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    def stop(self) -> None:
        """Waits until the system says that it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def source_process(
    backend: str, pause_at: int = -1, *, within: Sequence[str] = (), host: str = HOST
) -> AsyncIterator[SourceProcess]:
    """`within` is a command that runs the process somewhere else."""
    if why := missing(backend):
        pytest.skip(why)
    process = await asyncio.create_subprocess_exec(
        *within,
        sys.executable,
        "-m",
        "tests.support.kv_source_process",
        backend,
        str(pause_at),
        host,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            ready = json.loads(await process.stdout.readline())
        yield SourceProcess(
            process,
            KvSource(
                transfer_id="t",
                epoch=1,
                worker_id="source",
                incarnation="source-1",
                control_address=ready["address"],
                data_address=ready["data_address"],
                backend=backend,
                block_table=ALL,
                num_tokens=0,
                lease_expires_in_ms=60_000,
            ),
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def receiver(backend: str) -> AsyncIterator[Side]:
    async with ChannelPool() as channels:
        cluster = Cluster(backend)
        side = await cluster.side(
            "target",
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
            silence_s=30.0,
            pull_rpc=KvTransferClient(channels).pull_rpc,
        )
        try:
            yield side
        finally:
            await cluster.close()


async def wiped_and_left_alone(side: Side) -> None:
    """No one writes to the pool any more."""
    side.region.view[:] = bytes(len(side.region.view))
    await asyncio.sleep(0.05)
    assert not any(side.region.view.tobytes())


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_whole_pull_between_processes_and_a_kill_when_idle(backend: str) -> None:
    async with source_process(backend) as peer, receiver(backend) as side:
        result = await side.channel.pull(Pull(peer.source, ALL, ALL[::-1].copy(), timeout_s=30.0))
        assert result.bytes == NUM_BLOCKS * BLOCK_BYTES
        theirs = random_region(NUM_BLOCKS, BLOCK_BYTES, SEED)
        assert blocks_of(side.region, ALL[::-1]) == blocks_of(theirs, ALL)
        await peer.kill()
        async with asyncio.timeout(10):
            with pytest.raises(PeerLost):
                await side.channel.pull(Pull(peer.source, ALL, ALL, timeout_s=60.0))


@at_steps(0, 1, 3, of_mooncake=1)
async def test_a_source_killed_half_way_is_lost_long_before_the_deadline(backend: str, pause_at: int) -> None:
    async with source_process(backend, pause_at) as peer, receiver(backend) as side:
        pull = asyncio.create_task(side.channel.pull(Pull(peer.source, ALL, ALL, timeout_s=60.0)))
        await peer.paused()
        await peer.kill()
        async with asyncio.timeout(10):
            with pytest.raises(PeerLost):
                await pull
        await wiped_and_left_alone(side)


@at_steps(-1, 0, 2, of_mooncake=2)
async def test_a_stopped_source_is_lost_at_the_deadline(backend: str, pause_at: int) -> None:
    async with source_process(backend, pause_at) as peer, receiver(backend) as side:
        if pause_at < 0:
            peer.stop()
        async with asyncio.timeout(15):
            pull = asyncio.create_task(side.channel.pull(Pull(peer.source, ALL, ALL, timeout_s=1.0)))
            if pause_at >= 0:
                await peer.paused()
                peer.stop()
            with pytest.raises(PeerLost):
                await pull
        side.region.view[:] = bytes(len(side.region.view))
        peer.go_on()
        await asyncio.sleep(0.05)
        assert not any(side.region.view.tobytes()), "what it sent late was written"


def run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.contextmanager
def network_of_its_own() -> Iterator[tuple[str, str, str]]:
    """A network namespace joined with ours by a cable: (its name, our address, its address)."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("a black hole in the network needs root and the ip command: run as root with iproute2 installed")
    name, number = f"sagellm{os.getpid()}", os.getpid() % 250
    ours, theirs = f"10.199.{number}.1", f"10.199.{number}.2"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}; run with CAP_SYS_ADMIN")
    try:
        for command in (
            f"ip link add {name}a type veth peer name {name}b netns {name}",
            f"ip address add {ours}/30 dev {name}a",
            f"ip link set {name}a up",
            f"ip -n {name} address add {theirs}/30 dev {name}b",
            f"ip -n {name} link set {name}b up",
            f"ip -n {name} link set lo up",
        ):
            run(command)
        yield name, ours, theirs
    finally:
        run(f"ip netns delete {name}")


async def test_a_source_behind_a_black_hole_is_lost_at_the_deadline_and_found_again() -> None:
    """Its packets vanish, and no connection ends."""
    with network_of_its_own() as (name, ours, theirs):
        within = ("ip", "netns", "exec", name)
        async with source_process("tcp", within=within, host=theirs) as peer, receiver("tcp") as side:
            await side.channel.pull(Pull(peer.source, ALL, ALL, timeout_s=30.0))
            run(f"ip -n {name} route add blackhole {ours}/32")
            async with asyncio.timeout(15):
                with pytest.raises(PeerLost) as lost:
                    await side.channel.pull(Pull(peer.source, ALL, ALL, timeout_s=0.5))
            assert isinstance(lost.value.__cause__, TimeoutError)
            await wiped_and_left_alone(side)
            run(f"ip -n {name} route delete blackhole {ours}/32")
            await side.channel.pull(Pull(peer.source, ALL, ALL, timeout_s=30.0))
            assert blocks_of(side.region, ALL) == blocks_of(random_region(NUM_BLOCKS, BLOCK_BYTES, SEED), ALL)


async def test_handshake_over_the_wire() -> None:
    async with source_process("tcp") as peer, ChannelPool() as channels:
        client = KvTransferClient(channels)
        me = {"worker_id": "target", "incarnation": "target-1"}
        await client.handshake(peer.source, layout=a_layout(BLOCK_BYTES), **me)
        with pytest.raises(LayoutMismatch, match="block_bytes is 262144 on source and 128 on target"):
            await client.handshake(peer.source, layout=a_layout(128), **me)
        with pytest.raises(PeerLost, match="restarted"):
            restarted = replace(peer.source, incarnation="source-0")
            await client.handshake(restarted, layout=a_layout(BLOCK_BYTES), **me)
        assert await client.renew(peer.source) == 60.0
        await client.release(peer.source, committed=True)
        await peer.kill()
        # Agreed once, so not asked again; and a release that nobody hears is no error.
        await client.handshake(peer.source, layout=a_layout(BLOCK_BYTES), **me)
        await client.release(peer.source, committed=True)
