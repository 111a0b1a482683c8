from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from sagellm_common.comm_backend.wire import IOV_MAX, Wire, split_address


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    listener = socket.create_server(("127.0.0.1", 0))
    left = socket.create_connection(listener.getsockname())
    right, _ = listener.accept()
    listener.close()
    wires = Wire(left, 10.0), Wire(right, 10.0)
    for wire in wires:
        wire.deadline_s = time.monotonic() + 20
    yield wires
    for wire in wires:
        wire.close()


def test_gathers_and_scatters_across_any_cuts(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    payload = bytes(n % 251 for n in range(300_000))
    parts = [payload[n : n + 100] for n in range(0, len(payload), 100)]
    assert len(parts) > 2 * IOV_MAX
    sender = threading.Thread(target=left.send, args=(parts,))
    sender.start()
    buffers = [bytearray(7), bytearray(199_993), *(bytearray(50) for _ in range(2000))]
    right.recv_into(buffers)
    sender.join(10)
    assert b"".join(buffers) == payload


def test_an_end_between_and_within_messages(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    left.send([b"abc"])
    left.close()
    assert right.recv(1) == b"a"
    with pytest.raises(ConnectionResetError, match="half-way"):
        right.recv(10)
    with pytest.raises(EOFError):
        right.recv(10)


@pytest.mark.parametrize(("silence_s", "deadline_s"), [(0.05, 20.0), (20.0, 0.05), (20.0, -1.0)])
def test_waits_end(ends: tuple[Wire, Wire], silence_s: float, deadline_s: float) -> None:
    left, right = ends
    for wire in ends:
        wire._silence_s = silence_s
        wire.deadline_s = time.monotonic() + deadline_s
    with pytest.raises(TimeoutError):
        right.recv(1)
    with pytest.raises(TimeoutError):
        left.send([bytes(1 << 20)] * 64)


def test_abort_ends_a_wait_of_another_thread(ends: tuple[Wire, Wire]) -> None:
    _, right = ends
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            right.recv(1)
        except (EOFError, OSError) as err:
            caught.append(err)

    waiter = threading.Thread(target=wait)
    waiter.start()
    right.abort()
    waiter.join(5)
    assert not waiter.is_alive()
    assert isinstance(caught[0], EOFError)


def test_readable(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    assert not right.readable(0)
    left.send([b"x"])
    assert right.readable(10)
    assert right.recv(1) == b"x"
    left.close()
    assert right.readable(10)


def test_addresses() -> None:
    assert split_address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    for wrong in ("", "host", "host:", ":80", "host:port"):
        with pytest.raises(ValueError, match="not host:port"):
            split_address(wrong)
