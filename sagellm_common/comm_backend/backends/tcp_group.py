"""Groups over TCP: for each stream in each direction a connection of its own.

The sender connects to the receiver's address and says who it is:

    hello   magic, version, stream, rank, size, len(group); the group's name (UTF-8)
    then, for each message: a head (`link_frames`) and its bytes
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass

from sagellm_common.comm_backend.link_frames import HEAD_BYTES, check_head, check_payload, encode_head
from sagellm_common.comm_backend.link_group import LinkGroup, Stream
from sagellm_common.comm_backend.tensor_calls import rank_of
from sagellm_common.comm_backend.wire import split_address
from sagellm_common.core.errors import ConfigError, InvalidRequest

log = logging.getLogger(__name__)

MAGIC = b"SKCG"
VERSION = 1
_HELLO = struct.Struct("<4sBBHiiH")
HELLO_S = 5.0
"""A connection that has not said by then whose it is, is closed."""
MAX_UNCLAIMED = 1024
"""Connections for groups that this process has not joined yet; beyond, the oldest is closed."""

Arrival = tuple[str, Stream, int]
"""(group, stream, rank of the sender)"""


class TcpComm:
    """A `CommBackendProtocol`."""

    name = "tcp"

    def __init__(self, host: str, port: int) -> None:
        self.address = ""
        self._host, self._port = host, port
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived: OrderedDict[Arrival, socket.socket] = OrderedDict()
        self._expected: dict[Arrival, asyncio.Future[socket.socket]] = {}
        self._links: dict[str, TcpLinks] = {}

    async def start(self) -> str:
        try:
            self._listener = socket.create_server((self._host, self._port), backlog=128)
        except OSError as err:
            raise ConfigError(
                f"groups cannot listen on {self._host}:{self._port}: {err.strerror}; choose another port"
            ) from err
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))
        self.address = f"{self._host}:{self._listener.getsockname()[1]}"
        return self.address

    async def join(self, group: str, members: Sequence[str], *, timeout_s: float) -> LinkGroup:
        rank = rank_of(self.address, members)
        if group in self._links:
            raise InvalidRequest(f"group: {group!r} is joined already; a name is used once")
        links = self._links[group] = TcpLinks(self, group, members, rank)
        formed = LinkGroup(group, links, rank, len(members))
        await formed.join(timeout_s)
        return formed

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._listener is not None:
            self._listener.close()
        for links in list(self._links.values()):
            links.close()
        for sock in self._arrived.values():
            sock.close()
        self._arrived.clear()

    async def arrival(self, which: Arrival) -> socket.socket:
        """The connection that a member makes, now or later."""
        if (sock := self._arrived.pop(which, None)) is not None:
            return sock
        future: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._expected[which] = future
        try:
            return await future
        finally:
            del self._expected[which]

    def forget(self, group: str) -> None:
        """Ends the waits of a group that this process has left."""
        self._links.pop(group, None)
        for which, future in self._expected.items():
            if which[0] == group and not future.done():
                future.set_exception(EOFError())
        for which in [which for which in self._arrived if which[0] == group]:
            self._arrived.pop(which).close()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as err:
                # Out of descriptors, or a peer that left the backlog: the next one may be fine.
                log.warning("groups: accept failed: %s", err)
                await asyncio.sleep(0.05)
                continue
            sock.setblocking(False)
            self._spawn(self._greet(sock))

    async def _greet(self, sock: socket.socket) -> None:
        """Reads whose connection it is. Nothing a peer sends gets past this."""
        try:
            async with asyncio.timeout(HELLO_S):
                which = await _read_hello(sock)
        except (OSError, EOFError, ValueError) as err:
            log.warning("groups: closing a connection that did not introduce itself: %s", err or "it was silent")
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            expected = self._expected.get(which)
            if expected is not None and not expected.done():
                expected.set_result(sock)
                return
            if (old := self._arrived.pop(which, None)) is not None:
                old.close()
            self._arrived[which] = sock
            while len(self._arrived) > MAX_UNCLAIMED:
                self._arrived.popitem(last=False)[1].close()


@dataclass(slots=True, eq=False)
class _Lane:
    """One connection, and the number of the next message on it."""

    sock: socket.socket
    next: int = 0
    busy: bool = False
    closed: bool = False

    @contextlib.contextmanager
    def used(self) -> Iterator[socket.socket]:
        self.busy = True
        try:
            yield self.sock
        finally:
            self.busy = False
            if self.closed:
                self.sock.close()

    def close(self) -> None:
        """A wait on it ends first: a loop must not watch a descriptor that is someone else's by then."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        if not self.busy:
            self.sock.close()


class TcpLinks:
    """The `Links` of one member."""

    def __init__(self, comm: TcpComm, group: str, members: Sequence[str], rank: int) -> None:
        self._comm = comm
        self._group = group
        self._members = members
        self._rank = rank
        self._out: dict[tuple[Stream, int], _Lane] = {}
        self._in: dict[tuple[Stream, int], _Lane] = {}
        self._closed = False

    async def send(self, stream: Stream, to: int, payload: memoryview) -> None:
        lane = self._out.get((stream, to)) or self._keep(self._out, stream, to, await self._connected(stream, to))
        with lane.used() as sock:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, encode_head(lane.next, payload))
            if len(payload):
                await loop.sock_sendall(sock, payload)
        lane.next += 1

    async def recv_into(self, stream: Stream, source: int, payload: memoryview) -> None:
        lane = self._in.get((stream, source)) or self._keep(
            self._in, stream, source, await self._comm.arrival((self._group, stream, source))
        )
        with lane.used() as sock:
            head = bytearray(HEAD_BYTES)
            await _fill(sock, memoryview(head))
            digest = check_head(head, lane.next, len(payload))
            await _fill(sock, payload)
        check_payload(payload, digest)
        lane.next += 1

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for lane in (*self._out.values(), *self._in.values()):
                lane.close()
            self._comm.forget(self._group)

    def _keep(self, lanes: dict[tuple[Stream, int], _Lane], stream: Stream, rank: int, sock: socket.socket) -> _Lane:
        if self._closed:
            sock.close()
            raise EOFError
        lane = lanes[stream, rank] = _Lane(sock)
        return lane

    async def _connected(self, stream: Stream, to: int) -> socket.socket:
        try:
            host, port = split_address(self._members[to])
        except ValueError as err:
            raise InvalidRequest(f"members: {err}") from err
        name = self._group.encode()
        hello = _HELLO.pack(MAGIC, VERSION, stream, 0, self._rank, len(self._members), len(name)) + name
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (host, port))
            await loop.sock_sendall(sock, hello)
        except BaseException:
            sock.close()
            raise
        return sock


async def _read_hello(sock: socket.socket) -> Arrival:
    """Raises ValueError for anything else."""
    head = bytearray(_HELLO.size)
    await _fill(sock, memoryview(head))
    magic, version, stream, _, rank, _, name_bytes = _HELLO.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"it began with {bytes(head)!r}")
    name = bytearray(name_bytes)
    await _fill(sock, memoryview(name))
    return name.decode(), Stream(stream), rank


async def _fill(sock: socket.socket, buffer: memoryview) -> None:
    """Raises EOFError when the peer closes before that."""
    loop = asyncio.get_running_loop()
    while len(buffer):
        received = await loop.sock_recv_into(sock, buffer)
        if not received:
            raise EOFError
        buffer = buffer[received:]
