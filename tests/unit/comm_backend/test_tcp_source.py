"""The source of the TCP byte path against peers that do not keep to the protocol."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_common.comm_backend import frames
from sagellm_common.comm_backend.backends.tcp_source import TcpSource
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError
from tests.support.kv_channels import HOST, Cluster, Side

IDS = np.array([1, 2], dtype=np.int32)


def a_request(num_blocks: int = 2, first_block: int = 1, **changes: object) -> bytes:
    block_ids = np.arange(first_block, first_block + num_blocks, dtype=np.int32)
    parameters = {"block_bytes": 64, "digest": False, "timeout_s": 5.0, "group_blocks": 1000} | changes
    return frames.encode_pull("t", 1, block_ids, **parameters)  # type: ignore[arg-type]


@pytest.fixture
async def source() -> AsyncIterator[Side]:
    workers = Cluster("tcp")
    side = await workers.side("source", silence_s=5.0)
    side.pin("t", IDS)
    yield side
    await workers.close()


def connect(side: Side) -> socket.socket:
    host, port = side.channel.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def all_of(sock: socket.socket) -> bytes:
    """Everything until the source closes."""
    received = b""
    while part := sock.recv(1 << 16):
        received += part
    return received


def answers(side: Side) -> None:
    """A well-formed request is served."""
    with connect(side) as sock:
        sock.sendall(a_request())
        sock.shutdown(socket.SHUT_WR)
        expected = frames.encode_accepted() + bytes(side.region.block(1)) + bytes(side.region.block(2)) + frames.TRAILER
        assert all_of(sock) == expected


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n", "starts with b'GET '"),
        (b"SKVT\x09" + a_request()[5:], "version 9 op 1"),
        (b"SKVT\x02\x07" + a_request()[6:], "version 2 op 7"),
        (a_request(group_blocks=0), "asks for groups of 0 blocks"),
        (a_request(group_blocks=1001), "asks for groups of 1001 blocks of 64 bytes"),
        (a_request(group_blocks=3, block_bytes=32 << 20), "asks for groups of 3 blocks of 33554432 bytes"),
        (
            frames.REQUEST.pack(frames.MAGIC, frames.VERSION, 1, 0, 0, 1, 0, 1000, 1, 2**32 - 1, 64, 1),
            "asks for 4294967295 blocks",
        ),
        (frames.REQUEST.pack(frames.MAGIC, frames.VERSION, 1, 0, 0, 1, 0, 1000, 1, 0, 64, 1), "asks for 0 blocks"),
        (
            frames.REQUEST.pack(frames.MAGIC, frames.VERSION, 1, 0, 0, 2, 0, 1000, 1, 1, 64, 1)
            + b"\xff\xfe"
            + bytes(4),
            "not UTF-8",
        ),
        (frames.REQUEST.pack(frames.MAGIC, frames.VERSION, 1, 0, 99, 1, 0, 1000, 1, 1, 64, 1), "asks for dtype 99"),
    ],
    ids=["http", "version", "op", "no-group", "group", "group-bytes", "too-many", "none", "name", "dtype"],
)
async def test_a_malformed_request_costs_its_connection_only(
    source: Side, bad: bytes, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(source) as sock, caplog.at_level(logging.WARNING):
        sock.sendall(bad)
        # A reset when it was closed with bytes of the request unread.
        with contextlib.suppress(ConnectionResetError):
            assert all_of(sock) == b""
    assert complaint in caplog.text
    assert "Traceback" not in caplog.text
    answers(source)


@pytest.mark.parametrize("cut", [1, frames.REQUEST.size - 1, frames.REQUEST.size, frames.REQUEST.size + 3])
async def test_a_request_cut_short(source: Side, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    with connect(source) as sock, caplog.at_level(logging.WARNING):
        sock.sendall(a_request()[:cut])
        sock.shutdown(socket.SHUT_WR)
        assert all_of(sock) == b""
    assert "lost receiver" in caplog.text
    answers(source)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(min_size=1, max_size=200), at=st.integers(0, 60))
def test_no_bytes_harm_it(source: Side, noise: bytes, at: int) -> None:
    request = a_request()
    with connect(source) as sock:
        # It may close on the first wrong byte.
        with contextlib.suppress(OSError):
            sock.sendall(request[:at] + noise + request[at + len(noise) :])
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            all_of(sock)
    answers(source)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (a_request(block_bytes=65), b"LAYOUT_MISMATCH"),
        (a_request(num_blocks=3), b"LEASE_EXPIRED"),
    ],
)
async def test_a_refusal_is_typed_and_leaves_the_connection_usable(
    source: Side, request_: bytes, reason: bytes
) -> None:
    with connect(source) as sock:
        sock.sendall(request_ + a_request())
        sock.shutdown(socket.SHUT_WR)
        received = all_of(sock)
    accepted, reason_bytes, message_bytes = frames.decode_answer(received[: frames.ANSWER.size])
    assert not accepted
    text = received[frames.ANSWER.size :]
    assert text[:reason_bytes] == reason
    assert text[reason_bytes + message_bytes :].startswith(frames.encode_accepted())


async def test_a_receiver_that_takes_nothing_holds_the_lease_no_longer_than_its_time() -> None:
    workers = Cluster("tcp")
    side = await workers.side("source", num_blocks=64, block_bytes=1 << 20, silence_s=0.2)
    pinned = np.arange(64, dtype=np.int32)
    side.pin("t", pinned)
    try:
        with connect(side) as sock:
            sock.sendall(a_request(64, first_block=0, block_bytes=1 << 20, timeout_s=60.0, group_blocks=1))
            assert side.watched.quiet.wait(20)
            side.leases.release("t", 1, committed=False)
            assert len(side.freed) == 1
    finally:
        await workers.close()


async def test_a_receiver_that_dies_gives_the_lease_back() -> None:
    workers = Cluster("tcp")
    side = await workers.side("source", num_blocks=64, block_bytes=1 << 20, silence_s=60)
    pinned = np.arange(64, dtype=np.int32)
    side.pin("t", pinned)
    try:
        with connect(side) as sock:
            sock.sendall(a_request(64, first_block=0, block_bytes=1 << 20, timeout_s=60.0, group_blocks=1))
            assert sock.recv(1000)
            # Closed with bytes unread: a reset, as from a process that was killed.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert side.watched.quiet.wait(20)
    finally:
        await workers.close()


async def test_a_port_in_use_is_a_config_error(source: Side) -> None:
    port = int(source.channel.address.split(":")[1])
    second = TcpSource(lambda: source.region, source.leases, 1.0, HOST, port, KVTransportConfig(TransportConfig()))
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
        second.start()
    second.close()


async def test_close_leaves_no_thread(source: Side) -> None:
    with connect(source) as sock:
        sock.sendall(a_request())
        assert sock.recv(4) == frames.MAGIC
        await source.channel.close()
        await source.channel.close()
        assert not [t for t in threading.enumerate() if t.name in ("kv-accept", "kv-serve")]
