"""The shm byte path: what lies between two processes is named; memory is shown to nobody else and kept by nobody."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import logging
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.comm_backend import frames
from sagellm_common.comm_backend.backends import peer_memory, shm_address
from sagellm_common.comm_backend.backends.peer_memory import ProcessMemory
from sagellm_common.comm_backend.backends.shm_address import reachable_address
from sagellm_common.comm_backend.frames import MalformedFrame
from sagellm_common.comm_backend.pieces import blocks
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.core.errors import ConfigError, PeerLost
from tests.support.kv_channels import Cluster, Side, blocks_of, random_region
from tests.support.waiting import eventually

IDS = np.array([1, 2], dtype=np.int32)
TIMEOUT_S = 10.0


@pytest.fixture
async def workers() -> AsyncIterator[Cluster]:
    workers = Cluster("shm")
    yield workers
    await workers.close()


async def connected(side: Side) -> socket.socket:
    """A connection to a source, without the receiver's protocol."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(reachable_address(side.source("t", IDS)).socket_name)
    return sock


def a_request(**changes: object) -> bytes:
    parameters = {"block_bytes": 64, "digest": False, "timeout_s": 60.0, "group_blocks": 2} | changes
    return frames.encode_pull("t", 1, IDS, **parameters)  # type: ignore[arg-type]


def mappings() -> int:
    gc.collect()  # pools of tests before this one
    return Path("/proc/self/maps").read_text().count("/memfd:sagellm-kv")


# ---- where it cannot be used ----


@pytest.mark.parametrize(
    ("part", "complaint"), [(1, "another host, with boot id elsewhere"), (2, "another network namespace, elsewhere")]
)
async def test_a_source_that_is_elsewhere_is_named_with_the_way_out(
    workers: Cluster, part: int, complaint: str
) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", IDS)
    parts = pinned.data_address.split(":")
    parts[part] = "elsewhere"
    with pytest.raises(ConfigError, match=rf"'source' is on {complaint}.*transport\.backend=tcp"):
        await target.channel.pull(Pull(replace(pinned, data_address=":".join(parts)), IDS, IDS, timeout_s=TIMEOUT_S))


@pytest.mark.parametrize("address", ["127.0.0.1:80", "shm:a:b", "shm:a::c", ""])
async def test_an_address_of_another_byte_path(workers: Cluster, address: str) -> None:
    target = await workers.side("target")
    source = replace(target.source("t", IDS), data_address=address)
    with pytest.raises(PeerLost, match="not shm:HOST:NAMESPACE:NAME"):
        await target.channel.pull(Pull(source, IDS, IDS, timeout_s=TIMEOUT_S))


def test_private_memory_in_another_pid_namespace() -> None:
    with pytest.raises(ConfigError, match=r"'source' is in another PID namespace.*transport\.backend=tcp"):
        ProcessMemory("source", 0, 1 << 20, 100)


def test_private_memory_without_ptrace_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        @staticmethod
        def process_vm_readv(*_: object) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(peer_memory, "_libc", Refusing)
    region = random_region(4, 64)
    memory = ProcessMemory("source", os.getpid(), 1 << 20, 256)
    with pytest.raises(ConfigError, match="may not read source 'source'.*ptrace_scope=0.*transport.backend=tcp"):
        memory.copy(np.array([0, 64]), blocks(region, IDS), digest=True)


def test_private_memory_that_is_not_there() -> None:
    region = random_region(4, 64)
    with pytest.raises(OSError, match="cannot be read: Bad address"):
        ProcessMemory("source", os.getpid(), 16, 256).copy(np.array([0, 64]), blocks(region, IDS), digest=True)
    with pytest.raises(MalformedFrame, match="outside of its memory of 100"):
        ProcessMemory("source", os.getpid(), 1 << 20, 100).copy(np.array([0, 64]), blocks(region, IDS), digest=True)


async def test_other_users_are_not_served(
    workers: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", IDS)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with caplog.at_level(logging.WARNING):
        with await connected(source) as sock:
            assert sock.recv(1) == b""
        with pytest.raises(PeerLost, match=f"runs as user {real}"):
            await target.channel.pull(Pull(pinned, IDS, IDS, timeout_s=TIMEOUT_S))
    assert f"comes from user {real}, not from {real + 1}" in caplog.text


# ---- the memory ----


async def test_memory_is_mapped_once_and_let_go_with_its_source(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pools = mappings()
    pinned = source.pin("t", IDS)

    async def pull(to: int) -> None:
        await target.channel.pull(Pull(pinned, IDS, IDS + to, timeout_s=TIMEOUT_S))

    await asyncio.gather(*(pull(to) for to in range(0, 20, 2)))
    assert mappings() == pools + 1
    await source.channel.close()
    with pytest.raises(PeerLost):
        await pull(0)
    assert mappings() == pools


async def test_pulls_leave_no_descriptor(workers: Cluster) -> None:
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", IDS)
    await target.channel.pull(Pull(pinned, IDS, IDS, timeout_s=TIMEOUT_S))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        await target.channel.pull(Pull(pinned, IDS, IDS, timeout_s=TIMEOUT_S))
        with await connected(source) as sock:
            sock.sendall(a_request())
            _, descriptors, *_ = socket.recv_fds(sock, 100, 4)
            assert len(descriptors) == 1
            os.close(descriptors[0])
    await asyncio.to_thread(source.watched.quiet.wait, 10)
    await target.channel.pull(Pull(pinned, IDS, IDS, timeout_s=TIMEOUT_S))
    await eventually(lambda: len(os.listdir("/proc/self/fd")) == before)


async def test_a_pool_that_is_made_anew_is_mapped_anew(workers: Cluster) -> None:
    """As a store's: its memory comes with its first layout."""
    source, target = await workers.side("source"), await workers.side("target")
    pinned = source.pin("t", IDS)
    await target.channel.pull(Pull(pinned, IDS, IDS, timeout_s=TIMEOUT_S))
    source.region = random_region(64, 64, 99, in_file=True)
    source.channel._source._memory = lambda: source.region  # type: ignore[attr-defined]
    await target.channel.pull(Pull(pinned, IDS, IDS + 5, timeout_s=TIMEOUT_S))
    assert blocks_of(target.region, IDS + 5) == blocks_of(source.region, IDS)


# ---- the lease ----


async def test_blocks_are_held_until_they_are_copied(workers: Cluster) -> None:
    source = await workers.side("source")
    source.pin("t", IDS)
    with await connected(source) as sock:
        sock.sendall(a_request())
        accepted = sock.recv(1000)
        assert len(accepted) == frames.ANSWER.size + frames.MEMORY.size
        source.leases.release("t", 1, committed=False)
        assert source.freed == []
        sock.sendall(frames.COPIED)
        assert sock.recv(1000) == frames.TRAILER
    await asyncio.to_thread(source.watched.quiet.wait, 10)
    assert len(source.freed) == 1


@pytest.mark.parametrize("end", ["dies", "talks nonsense", "stops"])
async def test_a_receiver_that_does_not_copy_holds_the_blocks_no_longer(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And is not told that it has copied them right."""
    workers = Cluster("shm")
    source = await workers.side("source", silence_s=0.2 if end == "stops" else 60.0)
    source.pin("t", IDS)
    with await connected(source) as sock, caplog.at_level(logging.WARNING):
        sock.sendall(a_request())
        assert sock.recv(1000)
        source.leases.release("t", 1, committed=False)
        if end == "dies":
            sock.close()
        elif end == "talks nonsense":
            sock.sendall(b"x")
        assert await asyncio.to_thread(source.watched.quiet.wait, 20)
        if end != "dies":
            assert sock.recv(1000) == b""
    assert len(source.freed) == 1
    await workers.close()


async def test_a_source_that_gives_blocks_up_while_they_are_copied_is_lost(
    workers: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped receiver that goes on after its time finds that what it copied may be anybody's."""
    source, target = await workers.side("source"), await workers.side("target")
    real = peer_memory.MappedMemory.copy

    def slowly(self: peer_memory.MappedMemory, *args: object, **options: object) -> bytes:
        for wire in list(source.channel._source._wires):  # type: ignore[attr-defined]
            wire.abort()
        source.watched.quiet.wait(10)
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(peer_memory.MappedMemory, "copy", slowly)
    with pytest.raises(PeerLost):
        await target.channel.pull(Pull(source.pin("t", IDS), IDS, IDS, timeout_s=TIMEOUT_S))


def test_an_address_is_never_used_again() -> None:
    one, two = shm_address.own_address(), shm_address.own_address()
    assert one.name != two.name
    assert (one.host, one.namespace) == (two.host, two.namespace)
