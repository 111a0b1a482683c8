"""Blocking TCP with an end to every wait: scatter and gather between memoryviews, no staging copy."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview
IOV_MAX = 1024
_TIMEVAL = struct.Struct("@ll")


def split_address(address: str) -> tuple[str, int]:
    """host:port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is not host:port")
    return host.strip("[]"), int(port)


class Wire:
    """One connection. Waits end at `deadline_s` (monotonic) or after `silence_s` without a byte: TimeoutError.

    One thread sends and receives; `abort` may come from another one.

    Kernel timeouts instead of Python's: a Python timeout makes the socket non-blocking and costs a poll and an EAGAIN
    per call, and MSG_WAITALL, which fills a whole group in one system call, has no effect then.
    """

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._silence_s = silence_s
        self.deadline_s = 0.0

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Sends all of them. Raises TimeoutError, or OSError when the peer is gone."""
        pending = list(buffers)
        while pending:
            self._arm(socket.SO_SNDTIMEO)
            try:
                sent = self._sock.sendmsg(pending[:IOV_MAX])
            except BlockingIOError:
                raise TimeoutError("the peer takes no bytes") from None
            pending = _advance(pending, sent)

    def recv_into(self, buffers: Sequence[bytearray | memoryview]) -> None:
        """Fills all of them. Raises TimeoutError, EOFError when the peer closed before the first byte, else OSError."""
        pending: list[Buffer] = list(buffers)
        first = True
        while pending:
            self._arm(socket.SO_RCVTIMEO)
            try:
                received = self._sock.recvmsg_into(pending[:IOV_MAX], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                raise TimeoutError("the peer sends no bytes") from None
            if received == 0:
                raise EOFError if first else ConnectionResetError("the peer closed the connection half-way")
            pending, first = _advance(pending, received), False

    def recv(self, size: int) -> bytearray:
        buffer = bytearray(size)
        if size:
            self.recv_into([buffer])
        return buffer

    def readable(self, timeout_s: float) -> bool:
        """Whether there are bytes to read, or the peer's end, within timeout_s."""
        # Not select(), which cannot watch descriptors from 1024 on.
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def abort(self) -> None:
        """Ends the connection under a thread that waits on it: its call fails at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _arm(self, option: int) -> None:
        wait_s = min(self._silence_s, self.deadline_s - time.monotonic())
        if wait_s <= 0:
            raise TimeoutError("the deadline passed")
        # Zero would mean to wait forever.
        whole, micros = divmod(max(1, int(wait_s * 1e6)), 1_000_000)
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, micros))


def _advance(buffers: list[Buffer], done: int) -> list[Buffer]:
    """What is left of the buffers after `done` bytes."""
    for n, buffer in enumerate(buffers):
        if done < len(buffer):
            return [memoryview(buffer)[done:], *buffers[n + 1 :]]
        done -= len(buffer)
    return []
