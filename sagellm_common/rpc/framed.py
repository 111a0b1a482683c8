"""One end of a framed session: length-prefixed frames on a TCP connection, see `session.proto`.

    data_received ──► frames ──► on_frame             nothing is awaited, no task is switched to
    send ──► transport                                nor here, whatever the peer does

The peer is told dead after a silence that its answer to a PING would have broken. What it sends is never trusted: a
frame that is too long, of no known kind, or refused by `on_frame` ends the connection with the error as its last frame.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import cast

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from sagellm_common.core.errors import InvalidRequest, PeerLost, SageError
from sagellm_common.rpc.channels import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, MAX_MESSAGE_BYTES
from sagellm_common.rpc.status import from_status, to_status

_HEADER = struct.Struct("!IB")

MAX_HELLO_BYTES = 4096
STOOD_STILL_S = 1.0
"""A timer that comes so late was not late for the peer's sake: this process did not run."""
CLOSE_GRACE_S = 0.2
"""For a peer to read what was sent last."""


class Kind(IntEnum):
    HELLO = 1
    MESSAGE = 2
    END = 3
    PING = 4
    PONG = 5


_FOR_OWNER = frozenset((Kind.HELLO, Kind.MESSAGE, Kind.END))

OnFrame = Callable[[Kind, bytes], None]
"""Gets HELLO, MESSAGE and END frames, in order. Refuses one by raising SageError or a DecodeError."""


class FramedConnection(asyncio.Protocol):
    """Between `connection_made` and `lost`; what is sent before or after is dropped.

    `lost` is done when the connection is; `error` then says why, None when this end or the peer had simply ended it.
    `on_room` is called when the peer reads again after `full`.
    """

    def __init__(self, on_frame: OnFrame, on_room: Callable[[], None] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self.on_room = on_room
        self._transport: asyncio.Transport | None = None
        self._partial = bytearray()
        self._max_bytes = MAX_HELLO_BYTES
        self._heard_s = self._loop.time()
        self._pulse: asyncio.TimerHandle | None = None
        self._pulse_due_s = self._heard_s
        self._aborted = False
        self.full = False
        self.error: SageError | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    # ---- what its owner does ----

    @property
    def ended(self) -> bool:
        """Nothing is sent or taken any more."""
        return self._transport is None or self._transport.is_closing()

    def greeted(self, on_frame: OnFrame) -> None:
        """The peer is who it should be: messages follow."""
        self._max_bytes = MAX_MESSAGE_BYTES
        self._on_frame = on_frame

    def send(self, kind: Kind, *payloads: bytes) -> None:
        """A frame for each payload (none: an empty one), in one write. Never waits; `full` says that the peer does not
        keep up."""
        if not self.ended:
            frames = b"".join([part for p in payloads or (b"",) for part in (_HEADER.pack(len(p), kind), p)])
            cast(asyncio.Transport, self._transport).write(frames)

    def end(self, error: BaseException | None = None) -> None:
        """Sends END after what was sent before, and closes. Idempotent."""
        if self.ended:
            return
        self.send(Kind.END, to_status(error).SerializeToString() if error is not None else b"")
        self.error = self.error or (error if isinstance(error, SageError) else None)
        cast(asyncio.Transport, self._transport).close()
        self._loop.call_later(CLOSE_GRACE_S, self.abort)

    def abort(self) -> None:
        """Closes at once, also what is only about to be opened. Idempotent."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        """The peer has to wait; its silence does not count meanwhile."""
        if not self.ended:
            cast(asyncio.Transport, self._transport).pause_reading()
            self._stop_pulse()

    def resume_reading(self) -> None:
        if not self.ended:
            cast(asyncio.Transport, self._transport).resume_reading()
            self._heard_s = self._pulse_due_s = self._loop.time()
            self._beat()

    # ---- what asyncio calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._aborted:
            self._transport.abort()
            return
        # Loops do this by themselves today, and a token that waits for Nagle waits 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the kernel takes leaves at once, not at the end of the loop's turn; what it does not take is too much.
        self._transport.set_write_buffer_limits(high=0)
        self._heard_s = self._pulse_due_s = self._loop.time()
        self._beat()

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        if self._partial:
            self._partial += data
            taken = self._take(self._partial)
            del self._partial[:taken]
        elif (taken := self._take(data)) < len(data):
            self._partial += data[taken:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_pulse()
        self._transport = None
        if exc is not None and self.error is None:
            self.error = PeerLost(f"the connection broke: {exc}")
        if not self.lost.done():
            self.lost.set_result(None)
        self.full = False
        self.on_room()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self.on_room()

    # ---- parts of it ----

    def _take(self, data: bytes | bytearray) -> int:
        """Hands on the whole frames in `data`; returns how many of its bytes they were."""
        at, size = 0, len(data)
        while size - at >= _HEADER.size and not self.ended:
            length, kind = _HEADER.unpack_from(data, at)
            if length > self._max_bytes:
                self.end(InvalidRequest(f"a frame of {length} bytes; at most {self._max_bytes} are taken here"))
                break
            begin = at + _HEADER.size
            if size - begin < length:
                break
            at = begin + length
            self._handle(kind, bytes(data[begin:at]))
        return at

    def _handle(self, kind: int, payload: bytes) -> None:
        if kind == Kind.PING:
            self.send(Kind.PONG)
        elif kind in _FOR_OWNER:
            try:
                if kind == Kind.END and payload:
                    self.error = from_status(status_pb2.Status.FromString(payload))
                self._on_frame(Kind(kind), payload)
            except SageError as err:
                self.end(err)
            except DecodeError as err:
                self.end(InvalidRequest(f"the {len(payload)} bytes of a frame of kind {kind} are malformed: {err}"))
        elif kind != Kind.PONG:
            self.end(InvalidRequest(f"a frame of kind {kind}; kinds are {', '.join(f'{k} {k.name}' for k in Kind)}"))

    def _beat(self) -> None:
        """Asks a silent peer for a sign of life, and gives up one that gives none."""
        now_s = self._loop.time()
        if now_s - self._pulse_due_s > STOOD_STILL_S:
            self._heard_s = now_s - KEEPALIVE_S  # what the peer sent meanwhile is still to be read: ask once more
        silent_s = now_s - self._heard_s
        if silent_s >= KEEPALIVE_S + KEEPALIVE_TIMEOUT_S:
            self.error = PeerLost(f"the peer was silent for {silent_s:.0f} s")
            self.abort()
            return
        next_s = KEEPALIVE_S
        if silent_s >= KEEPALIVE_S:
            self.send(Kind.PING)
            next_s += KEEPALIVE_TIMEOUT_S
        self._pulse_due_s = self._heard_s + next_s
        self._pulse = self._loop.call_at(self._pulse_due_s, self._beat)

    def _stop_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.cancel()
