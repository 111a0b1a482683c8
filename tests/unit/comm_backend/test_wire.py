from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from sagellm_common.comm_backend import native
from sagellm_common.comm_backend.pieces import Pieces, digests
from sagellm_common.comm_backend.pieces import blocks as blocks_in
from sagellm_common.comm_backend.wire import IOV_MAX, Taken, Wire, is_exiting, split_address
from sagellm_common.core import cxx
from tests.support.kv_channels import random_region


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


def pieces_of(memory: bytearray, *sizes: int) -> Pieces:
    """Side by side, but the last two change places."""
    bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    bounds[-2:] = reversed(bounds[-2:])
    offsets = np.array([begin for begin, _ in bounds], dtype=np.int64)
    return Pieces(memoryview(memory), offsets, np.array([end - begin for begin, end in bounds], dtype=np.int64))


def scattered(pieces: Pieces) -> bytes:
    return b"".join(
        pieces.memory[at : at + size] for at, size in zip(pieces.offsets.tolist(), pieces.sizes.tolist(), strict=True)
    )


@pytest.fixture(params=["python", "native"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two ways the wire takes."""
    if request.param == "python":
        monkeypatch.setattr(native, "library", lambda: None)
    elif cxx.compiler() is None:
        pytest.skip("no C++ compiler: install g++ or set CXX")
    else:
        native.build()
        native.library.cache_clear()


@pytest.mark.usefixtures("library")
def test_digests_on_the_way(ends: tuple[Wire, Wire]) -> None:
    """Those sent are of what was sent, those taken on arrival of what arrived; in the tail behind the pieces, too."""
    left, right = ends
    source = pieces_of(bytearray(np.random.default_rng(1).bytes(3_000_000)), *(1000,) * 1000, *(1_000_000,) * 2)
    count = len(source.sizes)
    told, ours = bytearray(8 * count), bytearray(8 * count)
    message = bytearray(b"head"), source, told, memoryview(told)
    sender = threading.Thread(target=left.send, args=message)
    sender.start()
    head, tail, into = bytearray(4), bytearray(8 * count), pieces_of(bytearray(3_000_000), *source.sizes.tolist())
    assert right.recv_into(head, into, tail, memoryview(ours)) >= 0.0
    sender.join(10)
    assert head == b"head"
    assert scattered(into) == scattered(source)
    assert tail == told == ours == digests(source)


@pytest.mark.parametrize("blocks", [[3], [3, 0, 2]], ids=str)
def test_a_small_message_is_taken_in_one_go(ends: tuple[Wire, Wire], blocks: list[int]) -> None:
    """When all of it is there, and begins as it should; else nothing of it is."""
    if cxx.compiler() is None:
        pytest.skip("no C++ compiler: install g++ or set CXX")
    native.build()
    native.library.cache_clear()
    (left, right), size = ends, 300
    source, into = random_region(4, size, 1), random_region(4, size, 2)
    before, pieces = into.view.tobytes(), blocks_in(source, np.array(blocks, dtype=np.int32))

    def soon(wait_s: float = 5.0, digest: bool = True) -> Taken | None:
        until_s = time.monotonic() + wait_s
        return right.recv_soon(b"good", into.address, blocks, size, digest=digest, tail_bytes=3, until_s=until_s)

    left.send(b"good")
    assert soon(wait_s=0.0) is None
    told = bytearray(8 * len(blocks)) + b"end"
    left.send(b"", pieces, told, memoryview(told)[:-3])
    taken = soon()
    assert taken is not None
    assert (taken.told, taken.actual, taken.tail) == (digests(pieces), digests(pieces), b"end")
    assert all(into.block(block) == source.block(block) for block in blocks)
    into.view[:] = before
    left.send(b"good", pieces, b"end")
    assert soon(digest=False) == (b"", b"", b"end", 0.0)
    into.view[:] = before
    left.send(b"evil" + bytes(4000))
    assert soon() is None
    assert into.view.tobytes() == before
    assert right.recv(4) == b"evil"


@pytest.mark.usefixtures("library")
def test_ends_of_a_message_of_pieces(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    left.send(b"", pieces_of(bytearray(2000), 1000, 1000))
    left.close()
    with pytest.raises(ConnectionResetError, match="half-way"):
        right.recv_into(bytearray(), pieces_of(bytearray(3000), 1500, 1500))
    with pytest.raises(EOFError):
        right.recv_into(bytearray(), pieces_of(bytearray(3000), 1500, 1500))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("head", [0, 7])
@pytest.mark.parametrize("tail", [0, 3])
def test_gathers_and_scatters_across_any_cuts(ends: tuple[Wire, Wire], head: int, tail: int) -> None:
    left, right = ends
    payload = bytes(n % 251 for n in range(600_000))
    source = Pieces(memoryview(payload), np.arange(0, 600_000, 200), np.full(3000, 100))
    assert len(source.vectors()) > 2 * IOV_MAX
    sent = b"x" * head + scattered(source) + b"yz"
    sender = threading.Thread(target=left.send, args=(b"x" * head, source, b"yz"))
    sender.start()
    begin, end = bytearray(head), bytearray(tail)
    into = pieces_of(bytearray(300_002 - tail), 199_993, *(50,) * 2000, 300_002 - tail - 299_993)
    right.recv_into(begin, into, end)
    sender.join(10)
    assert begin + scattered(into) + end == sent


def test_an_end_between_and_within_messages(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    left.send(b"abc")
    left.close()
    assert right.recv(1) == b"a"
    with pytest.raises(ConnectionResetError, match="half-way"):
        right.recv(10)
    with pytest.raises(EOFError):
        right.recv(10)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("silence_s", "deadline_s"), [(0.05, 20.0), (20.0, 0.05), (20.0, -1.0)])
def test_waits_end(ends: tuple[Wire, Wire], silence_s: float, deadline_s: float) -> None:
    left, right = ends
    for wire in ends:
        wire._silence_s = silence_s
        wire.deadline_s = time.monotonic() + deadline_s
    with pytest.raises(TimeoutError):
        right.recv(1)
    with pytest.raises(TimeoutError):
        right.recv_into(bytearray(), pieces_of(bytearray(2000), 1000, 1000))
    with pytest.raises(TimeoutError):
        left.send(bytes(64 << 20))
    with pytest.raises(TimeoutError):
        left.send(b"", pieces_of(bytearray(64 << 20), 32 << 20, 32 << 20))


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


def test_a_peer_that_was_killed_is_gone_before_its_socket_is(ends: tuple[Wire, Wire]) -> None:
    """A zombie has closed its own: the test holds the peer's end open."""
    _, right = ends
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    right.peer_pid = process.pid
    try:
        assert not is_exiting(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ConnectionResetError, match="at its end"):
            right.recv(1)
    finally:
        process.communicate()
    assert not is_exiting(process.pid), "nobody is there to be asked about"


def test_readable(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    assert not right.readable(0)
    left.send(b"x")
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
