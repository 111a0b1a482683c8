"""Blocking stream sockets with an end to every wait: scatter and gather into KV memory, no staging copy.

Blocks go through `native/stream.h`, which digests them on their way; without the library, through the C library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import time
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sagellm_common.comm_backend import native
from sagellm_common.comm_backend.pieces import FEW, Pieces, Vectors, address_of, digests, pointer

Buffer = bytes | bytearray
IOV_MAX = 1024
FEW_BYTES = 128 << 10
SMALL_BLOCKS, SMALL_BYTES = 64, 1024
"""Of a small message the most blocks, and bytes around them."""
_TIMEVAL = struct.Struct("@ll")
WATCH_S = 0.01
_STAT_FLAGS, _PF_EXITING = 6, 0x4
"""proc(5): the flags of include/linux/sched.h, seventh behind the name of the process."""
_DOUBLE = struct.Struct("@d")


class _Message(ctypes.Structure):
    """struct msghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("num_vectors", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.restype, _call.argtypes = ctypes.c_ssize_t, (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)


_libc.ppoll.restype, _libc.ppoll.argtypes = (
    ctypes.c_int,
    (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p),
)


def _ppoll(descriptor: int, timeout_s: float) -> bool:
    """Whether there is something to read within timeout_s. Python's poll() knows milliseconds only."""
    watched = np.array([descriptor, select.POLLIN], dtype=np.int32)
    timeout = np.array([0, timeout_s * 1e9], dtype=np.int64)
    return bool(_libc.ppoll(watched.ctypes.data, 1, timeout.ctypes.data, None) > 0)


def split_address(address: str) -> tuple[str, int]:
    """host:port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is not host:port")
    return host.strip("[]"), int(port)


def is_exiting(pid: int) -> bool:
    """Whether the process was told to end, by itself or by a signal, and nothing of it runs any more."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return bool(int(file.read().rpartition(")")[2].split()[_STAT_FLAGS]) & _PF_EXITING)
    except (OSError, IndexError, ValueError):
        return False  # the socket will tell


class Taken(NamedTuple):
    """What came with small blocks: the digests that were sent, those of what arrived, the tail; and what they took."""

    told: bytes
    actual: bytes
    tail: bytes
    digest_s: float


class Wire:
    """One connection. Waits end at `deadline_s` (monotonic) or after `silence_s` without a byte: TimeoutError.

    One thread sends and receives; `abort` may come from another one.

    Kernel timeouts instead of Python's: a Python timeout makes the socket non-blocking and costs a poll and an EAGAIN
    per call, and MSG_WAITALL, which fills a whole group in one system call, has no effect then. And the C library's
    sendmsg and recvmsg instead of Python's, which want an object per block.
    """

    def __init__(self, sock: socket.socket, silence_s: float) -> None:
        sock.setblocking(True)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._silence_s = silence_s
        self._armed: dict[int, float] = {}
        """The kernel's timeouts as they are, by option: setting them costs a system call."""
        self._pollers: dict[int, select.poll] = {}
        self._message = ctypes.create_string_buffer(native.MESSAGE.size)
        self._scratch: Any = None
        self._scratch_at = 0
        """What is around the blocks of a small message, where native code finds it without being told anew."""
        self.deadline_s = 0.0
        self._checked_s = 0.0
        self.peer_pid = 0
        """Of a peer on this host, which `recv` watches: a process that was killed first gives back all of its memory,
        which may take a second, and only then closes its sockets. 0: it is not known."""

    def send(
        self, head: Buffer, pieces: Pieces | None = None, tail: Buffer = b"", taken: memoryview | None = None
    ) -> float:
        """Sends all of it, in this order. Raises TimeoutError, or OSError when the peer is gone.

        `taken`, which may lie in the tail, gets the `digests` of the pieces; returns the seconds that took.
        """
        if pieces is None:
            self._send_bytes(head + tail)
            return 0.0
        if _few(pieces):
            digest_s = _take(taken, pieces)
            self.send_views([part for part in (head, *pieces.views(), tail) if part])
            return digest_s
        streamed_s = self._stream(True, head, pieces, tail, taken)
        if streamed_s is not None:
            return streamed_s
        digest_s = _take(taken, pieces)
        self._each(_Runs(head, pieces, tail), _libc.sendmsg, socket.MSG_NOSIGNAL, socket.SO_SNDTIMEO)
        return digest_s

    def send_views(self, views: list[Buffer | memoryview]) -> None:
        """Sends all of them, in this order. Raises as `send`."""
        while views:
            self._arm(socket.SO_SNDTIMEO)
            try:
                done = self._sock.sendmsg(views, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                raise TimeoutError("the peer takes no bytes") from None
            views = _left(views, done)

    def recv_into(
        self, head: bytearray, pieces: Pieces, tail: bytearray | None = None, taken: memoryview | None = None
    ) -> float:
        """Fills all of them, in this order. Raises TimeoutError, EOFError when the peer closed before the first byte,
        else OSError. `taken` and what is returned are as in `send`."""
        if _few(pieces):
            self._recv_views([part for part in (head, *pieces.views(), tail) if part])
            return _take(taken, pieces)
        streamed_s = self._stream(False, head, pieces, b"" if tail is None else tail, taken)
        if streamed_s is not None:
            return streamed_s
        runs = _Runs(head, pieces, b"" if tail is None else tail)
        self._each(runs, _libc.recvmsg, socket.MSG_WAITALL, socket.SO_RCVTIMEO)
        return _take(taken, pieces)

    def recv_soon(
        self, head: bytes, address: int, blocks: list[int], size: int, *, digest: bool, tail_bytes: int, until_s: float
    ) -> Taken | None:
        """A message that is here at `until_s` (see `has_soon`): `head`, these blocks of `size` bytes into the memory
        at `address`, their digests if there are any, and the tail. None, and nothing was read, if it is not here or
        begins otherwise, or where that cannot be done in one call. Raises as `recv_into`."""
        library, count = native.library(), len(blocks)
        if library is None or count > SMALL_BLOCKS or len(head) + tail_bytes > SMALL_BYTES:
            return None
        self._armed.pop(socket.SO_RCVTIMEO, None)
        offsets, sizes = array("q", [block * size for block in blocks]), array("q", [size]) * count
        if self._scratch is None:
            self._scratch = ctypes.create_string_buffer(SMALL_BYTES + 2 * SMALL_BLOCKS * 8)
            self._scratch_at = ctypes.addressof(self._scratch)
        at, digest_bytes = self._scratch_at, 8 * count if digest else 0
        begin, taken = len(head), len(head) + digest_bytes + tail_bytes
        self._scratch[:begin] = head
        native.MESSAGE.pack_into(
            self._message,
            0,
            at,
            begin,
            address,
            offsets.buffer_info()[0],
            sizes.buffer_info()[0],
            count,
            0,
            at + begin,
            digest_bytes + tail_bytes,
            at + taken if digest else 0,
            self._silence_s,
            self.deadline_s,
            0.0,
            self._sock.fileno(),
            library.isas[-1],
        )
        failed = library.sage_answer(self._message, until_s)
        if failed in (native.NOT_YET, native.TOO_SHORT):
            return None
        _raise(failed)
        told = self._scratch[begin : begin + digest_bytes]
        return Taken(
            told,
            self._scratch[taken : taken + digest_bytes],
            self._scratch[begin + digest_bytes : taken],
            _DOUBLE.unpack_from(self._message, native.MESSAGE_DIGEST_S)[0],
        )

    def recv(self, size: int) -> bytearray:
        """Exactly so many bytes. Raises as `recv_into`."""
        buffer, done = bytearray(size), 0
        if self.peer_pid:
            self._watch()
        with memoryview(buffer) as view:
            while done < size:
                self._arm(socket.SO_RCVTIMEO)
                try:
                    received = self._sock.recv_into(view[done:], 0, socket.MSG_WAITALL)
                except BlockingIOError:
                    raise TimeoutError("the peer sends no bytes") from None
                if not received:
                    raise EOFError if not done else ConnectionResetError("the peer closed the connection half-way")
                done += received
        return buffer

    def recv_at_most(self, size: int) -> bytes:
        """What has come already, of the first `size` bytes; b"" when the peer closed. Only after `readable`."""
        return self._sock.recv(size, socket.MSG_DONTWAIT)

    def send_descriptors(self, head: bytes, descriptors: Sequence[int]) -> None:
        """`head`, a few bytes, and open files with it, over a Unix socket."""
        self._arm(socket.SO_SNDTIMEO)
        sent = socket.send_fds(self._sock, [head], descriptors)
        if sent < len(head):
            self.send(head[sent:])

    def recv_descriptors(self, size: int) -> tuple[bytearray, list[int]]:
        """`size` bytes and the open files that came with the first of them: the caller closes them."""
        if self.peer_pid:
            self._watch()
        self._arm(socket.SO_RCVTIMEO)
        try:
            first, descriptors, *_ = socket.recv_fds(self._sock, size, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise TimeoutError("the peer sends no bytes") from None
        try:
            if not first:
                raise EOFError
            return bytearray(first) + self.recv(size - len(first)), descriptors
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def readable(self, timeout_s: float) -> bool:
        """Whether there are bytes to read, or the peer's end, within timeout_s."""
        return bool(self._poller(select.POLLIN).poll(timeout_s * 1000))

    def closed_by_peer(self) -> bool:
        """Whether nobody is at the other end any more, whatever is still to be read."""
        return bool(self._poller(select.POLLRDHUP).poll(0))

    def available(self) -> int:
        """Bytes that can be read without waiting."""
        counted = bytearray(4)
        fcntl.ioctl(self._sock, termios.FIONREAD, counted)
        return int.from_bytes(counted, "little")

    def has_soon(self, size: int, until_s: float) -> bool:
        """Whether `size` bytes can be read without waiting, at the latest at `until_s` (monotonic, within a second)."""
        library = native.library()
        if library is not None:
            return bool(library.sage_has_soon(self._sock.fileno(), size, until_s))
        while self.available() < size:
            wait_s = until_s - time.monotonic()
            if wait_s <= 0 or not _ppoll(self._sock.fileno(), wait_s) or self.closed_by_peer():
                return False
        return True

    def peer_address(self) -> str:
        """host:port of a TCP connection's other end."""
        host, port, *_ = self._sock.getpeername()
        return f"{host}:{port}"

    def peer_credentials(self) -> tuple[int, int]:
        """(pid, uid) of whoever made the other end of a Unix socket; pid 0: it is in a PID namespace not seen here."""
        pid, uid, _ = struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid

    def abort(self) -> None:
        """Ends the connection under a thread that waits on it: its call fails at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _watch(self) -> None:
        """Until there is something to read, or `recv` would find out for itself that there is not."""
        until_s = min(self.deadline_s, time.monotonic() + self._silence_s)
        while not self.readable(min(WATCH_S, max(0.0, until_s - time.monotonic()))):
            if time.monotonic() >= until_s:
                return
            self.check_peer()

    def check_peer(self) -> None:
        """Raises ConnectionResetError when `peer_pid` is at its end. To be called often: it looks every WATCH_S."""
        now_s = time.monotonic()
        if self.peer_pid and now_s - self._checked_s >= WATCH_S:
            self._checked_s = now_s
            if is_exiting(self.peer_pid):
                raise ConnectionResetError(f"its process {self.peer_pid} is at its end")

    def _poller(self, events: int) -> select.poll:
        """Not select(), which cannot watch descriptors from 1024 on."""
        poller = self._pollers.get(events)
        if poller is None:
            poller = self._pollers[events] = select.poll()
            poller.register(self._sock, events)
        return poller

    def _send_bytes(self, data: Buffer) -> None:
        done = 0
        while done < len(data):
            self._arm(socket.SO_SNDTIMEO)
            try:
                done += self._sock.send(memoryview(data)[done:])
            except BlockingIOError:
                raise TimeoutError("the peer takes no bytes") from None

    # Of few pieces.

    def _recv_views(self, views: list[bytearray | memoryview]) -> None:
        first = True
        while views:
            self._arm(socket.SO_RCVTIMEO)
            try:
                done = self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                raise TimeoutError("the peer sends no bytes") from None
            if not done:
                raise EOFError if first else ConnectionResetError("the peer closed the connection half-way")
            views, first = _left(views, done), False

    def _stream(self, out: bool, head: Buffer, pieces: Pieces, tail: Buffer, taken: memoryview | None) -> float | None:
        """`send` or `recv_into`, in one call that holds no GIL; None, and nothing is done, where that cannot be."""
        library = native.library()
        if library is None:
            return None
        self._armed.pop(socket.SO_SNDTIMEO if out else socket.SO_RCVTIMEO, None)
        failed = library.sage_stream(self._packed(library, head, pieces, tail, taken), out)
        if failed == native.TOO_SHORT:
            return None
        _raise(failed)
        return _DOUBLE.unpack_from(self._message, native.MESSAGE_DIGEST_S)[0]  # type: ignore[no-any-return]

    def _packed(
        self, library: native.Library, head: Buffer, pieces: Pieces, tail: Buffer, taken: memoryview | None
    ) -> Any:
        """As native code wants it. Keep all of them alive."""
        message = self._message
        native.MESSAGE.pack_into(
            message,
            0,
            address_of(head),
            len(head),
            pieces.address,
            pointer(pieces.offsets),
            pointer(pieces.sizes),
            len(pieces.sizes),
            0 if pieces.parts is None else pointer(pieces.parts),
            address_of(tail),
            len(tail),
            address_of(taken) if taken else 0,
            self._silence_s,
            self.deadline_s,
            0.0,
            self._sock.fileno(),
            library.isas[-1],
        )
        return message

    def _each(self, runs: _Runs, function: Any, flags: int, option: int) -> None:
        """All the runs through sendmsg or recvmsg."""
        vectors, left, first = runs.vectors, runs.num_bytes, True
        while left:
            self._arm(option)
            some = vectors[:IOV_MAX]
            message = _Message(vectors=pointer(some), num_vectors=len(some))
            done = function(self._sock.fileno(), message, flags)
            if done < 0:
                code = ctypes.get_errno()
                if code == errno.EAGAIN:
                    raise TimeoutError("the peer moves no bytes")
                if code != errno.EINTR:
                    raise OSError(code, os.strerror(code))
                continue
            if done == 0:
                raise EOFError if first else ConnectionResetError("the peer closed the connection half-way")
            left, first = left - done, False
            if left:
                vectors = _rest(vectors, done)

    def _arm(self, option: int) -> None:
        wait_s = min(self._silence_s, self.deadline_s - time.monotonic())
        if wait_s <= 0:
            raise TimeoutError("the deadline passed")
        if self._armed.get(option) == wait_s:
            return
        self._armed[option] = wait_s
        # Zero would mean to wait forever.
        whole, micros = divmod(max(1, int(wait_s * 1e6)), 1_000_000)
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, micros))


def _raise(failed: int) -> None:
    """What native code ended with, unless it is 0."""
    if not failed:
        return
    if failed == native.CLOSED:
        raise EOFError
    if failed == errno.ETIMEDOUT:
        raise TimeoutError("the peer moves no bytes, or the deadline passed")
    if failed == errno.ECONNRESET:
        raise ConnectionResetError("the peer closed the connection half-way")
    raise OSError(failed, os.strerror(failed))


def _few(pieces: Pieces) -> bool:
    """Whether they are sooner done by Python's own calls than told to the library."""
    return len(pieces.sizes) < FEW and bool((pieces.sizes <= FEW_BYTES).all())


def _left(views: list[Any], done: int) -> list[Any]:
    """What `done` bytes leave of them."""
    for n, view in enumerate(views):
        if done < len(view):
            return [memoryview(view)[done:], *views[n + 1 :]]
        done -= len(view)
    return []


def _take(taken: memoryview | None, pieces: Pieces) -> float:
    if taken is None:
        return 0.0
    began_s = time.perf_counter()
    taken[:] = digests(pieces)
    return time.perf_counter() - began_s


class _Runs:
    """Where in this process the bytes of a message are; what they are of is kept alive."""

    def __init__(self, head: Buffer, pieces: Pieces, tail: Buffer) -> None:
        self._kept = [np.frombuffer(part, dtype=np.uint8) for part in (head, tail) if part]
        found = pieces.vectors(before=bool(head), after=bool(tail))
        if head:
            found[0] = pointer(self._kept[0]), len(head)
        if tail:
            found[-1] = pointer(self._kept[-1]), len(tail)
        self.vectors = found
        self.num_bytes = len(head) + pieces.num_bytes + len(tail)


def _rest(vectors: Vectors, done: int) -> Vectors:
    """What is left of the runs after `done` bytes of them; something is."""
    ends = np.cumsum(vectors[:, 1])
    at = int(np.searchsorted(ends, np.uint64(done), side="right"))
    left = vectors[at:].copy()
    rest = ends[at] - np.uint64(done)
    left[0] = left[0, 0] + left[0, 1] - rest, rest
    return left
