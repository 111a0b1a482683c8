"""Source side of a byte path over stream sockets: who asks for what, and under which lease. A thread per connection.

Threads, not the event loop: a group of blocks is copied into the kernel in one call that holds no GIL, and the loop
that streams tokens never waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import xxhash

from sagellm_common.comm_backend import frames, meter
from sagellm_common.comm_backend.bridge import Outgoing
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.frames import MalformedFrame, PullHeader
from sagellm_common.comm_backend.integrity import DIGEST_BYTES, segment_digest
from sagellm_common.comm_backend.pieces import Pieces, blocks, of_segment
from sagellm_common.comm_backend.protocol import Encode, LeasedBlocks, Memory
from sagellm_common.comm_backend.segments import Segment, SegmentCutter, layers_apart, split
from sagellm_common.comm_backend.wire import Wire
from sagellm_common.core import failpoints
from sagellm_common.core.errors import InvalidRequest, LayoutMismatch, SageError
from sagellm_common.core.kv import Allocation, KvMemory, KvRegion
from sagellm_common.core.kv_progress import KvProgress, Watermark
from sagellm_common.core.types import BlockIds

log = logging.getLogger(__name__)

IDLE_S = 300.0
"""A connection that asks for nothing this long is closed; the receiver makes a new one when it needs it."""
REQUEST_BYTES = 4096
"""Read at once. A request for a thousand blocks is longer."""
WAIT_S = 0.5
"""A receiver that waits for the computation hears this often that its source is alive."""


class SocketSource(ABC):
    """Serves the blocks of a pool that `leases` lets be read. What is sent, and when it is there, is the subclass's."""

    def __init__(
        self,
        memory: Memory,
        leases: LeasedBlocks,
        silence_s: float,
        settings: KVTransportConfig,
        encode: Encode | None = None,
    ) -> None:
        self._memory = memory
        self._encode = encode
        self._leases = leases
        self._silence_s = silence_s
        self._settings = settings
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._wires: dict[Wire, threading.Thread] = {}
        self._acceptor: threading.Thread | None = None

    def start(self) -> str:
        """Listens; returns the address. Raises ConfigError."""
        self._listener, address = self._listen()
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), name="kv-accept", daemon=True)
        self._acceptor.start()
        return address

    @abstractmethod
    def _listen(self) -> tuple[socket.socket, str]:
        """A listening socket and its address. Raises ConfigError when it cannot be had."""

    @abstractmethod
    def _admit(self, wire: Wire) -> str:
        """The peer's name in the log. Raises MalformedFrame for one that may not be served."""

    @abstractmethod
    def _send_accepted(self, wire: Wire, memory: KvMemory) -> None:
        """The request will be served: `SocketReceiver._take_accepted` reads it."""

    @abstractmethod
    def _send_blocks(self, wire: Wire, memory: KvMemory, header: PullHeader, block_ids: BlockIds) -> None:
        """The whole answer to a pull that is not inline; the blocks are held until it returns."""

    @abstractmethod
    def _send_segment(self, wire: Wire, segment: Segment, pieces: Pieces, *, digest: bool) -> None:
        """A segment of an answer along the computation; its blocks are held until it returns."""

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops listening, drops all connections and waits for their threads. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Closing alone does not wake a thread inside accept().
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        assert self._acceptor is not None
        self._acceptor.join(timeout_s)
        listener.close()
        with self._lock:
            threads = list(self._wires.values())
            for wire in self._wires:
                wire.abort()
        for thread in threads:
            thread.join(timeout_s)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as err:
                if self._listener is None:
                    return
                # Out of file descriptors, or a peer that left the backlog: the next one may be fine.
                log.warning("KV byte path: accept failed: %s", err)
                time.sleep(0.05)
                continue
            wire = Wire(sock, self._silence_s)
            thread = threading.Thread(target=self._serve, args=(wire,), name="kv-serve", daemon=True)
            with self._lock:
                self._wires[wire] = thread
            thread.start()

    def _serve(self, wire: Wire) -> None:
        """Answers one connection's requests until either side ends it. Nothing a peer sends gets past this."""
        peer = "a peer"
        try:
            peer = self._admit(wire)
            told: bytes | None = b""
            while told is not None:
                told = self._answer_next(wire, told)
        except MalformedFrame as err:
            log.warning("KV byte path: closing the connection from %s: its request %s", peer, err)
        except (OSError, EOFError) as err:
            log.warning("KV byte path: lost receiver %s: %s", peer, err or "closed within a request")
        except Exception:
            log.exception("KV byte path: serving %s failed", peer)
        finally:
            # Under the lock, so that `close` cannot abort a descriptor that is someone else's by then.
            with self._lock:
                del self._wires[wire]
                wire.close()

    def _answer_next(self, wire: Wire, told: bytes) -> bytes | None:
        """One request, which begins with `told`, and its answer; returns what was read beyond it, None when the
        receiver closed in between."""
        told = self._await_request(wire, told)
        if not told:
            return None
        header = frames.decode_request(told[: frames.REQUEST.size], self._memory().num_blocks)
        along = header.op == frames.OP_ALONG
        rest_bytes = header.transfer_id_bytes + (frames.ALONG.size if along else 4 * header.num_blocks)
        end = frames.REQUEST.size + rest_bytes
        rest, beyond = told[frames.REQUEST.size : end], told[end:]
        if len(rest) < rest_bytes:
            rest += wire.recv(rest_bytes - len(rest))
        try:
            transfer_id = rest[: header.transfer_id_bytes].decode()
        except UnicodeDecodeError:
            raise MalformedFrame("has a transfer id that is not UTF-8") from None
        wire.deadline_s = time.monotonic() + header.timeout_ms / 1000
        if along:
            self._answer_along(wire, header, transfer_id, *frames.ALONG.unpack_from(rest, header.transfer_id_bytes))
        else:
            self._answer(wire, header, transfer_id, frames.unpack_ids(rest[header.transfer_id_bytes :]))
        return beyond

    def _await_request(self, wire: Wire, told: bytes) -> bytes:
        """The next request, as much of it as came at once, the fixed part at least; b"": the receiver has no more."""
        if not told and not wire.readable(IDLE_S):
            return b""
        wire.deadline_s = time.monotonic() + self._silence_s
        told = told or wire.recv_at_most(REQUEST_BYTES)
        if told and len(told) < frames.REQUEST.size:
            told += wire.recv(frames.REQUEST.size - len(told))
        return told

    def _answer(self, wire: Wire, header: PullHeader, transfer_id: str, block_ids: BlockIds) -> None:
        accepted = False
        try:
            memory = self._readable(header, transfer_id, int(block_ids[-1]))
            with self._leases.reading(transfer_id, header.epoch, block_ids, len(block_ids) * header.block_bytes):
                accepted = True
                send = self._send_inline if header.op == frames.OP_INLINE else self._send_blocks
                send(wire, memory, header, block_ids)
        except SageError as err:
            if accepted:
                raise
            wire.send(frames.encode_refusal(err.reason, err.message))

    def _readable(self, header: PullHeader, transfer_id: str, last_block: int) -> KvMemory:
        """The pool, or its blocks in the dtype that is asked for. Raises LayoutMismatch, InvalidRequest."""
        memory: KvMemory = self._memory()
        if header.encoding is not None:
            if self._encode is None:
                raise InvalidRequest(f"transfer {transfer_id!r}: this source sends its blocks as they are")
            memory = self._encode(header.encoding.dtype, (last_block, header.encoding.last_block_tokens))
        if header.block_bytes != memory.block_bytes:
            raise LayoutMismatch(
                f"transfer {transfer_id!r}: the receiver's blocks have {header.block_bytes} bytes, "
                f"the source's {memory.block_bytes}; both need one KV layout"
            )
        return memory

    def _send_inline(self, wire: Wire, memory: KvMemory, header: PullHeader, block_ids: BlockIds) -> None:
        """Blocks through the socket: `SocketReceiver._take_inline` reads them."""
        if len(block_ids) == 1 and isinstance(memory, KvRegion):
            self._send_block(wire, memory, int(block_ids[0]), digest=header.digest)
            return
        head, done = frames.encode_accepted(), 0
        taken = bytearray(len(block_ids) * DIGEST_BYTES if header.digest else 0)
        groups = frames.groups(block_ids, header.group_blocks)
        for n, group in enumerate(groups, start=1):
            # A small answer is one system call; what is last has gone when all the rest has.
            failpoints.hit("source.sending")
            with memory.reading(group) as (region, ids):
                last = n == len(groups)
                tail = taken + frames.TRAILER + deviation_of(memory) if last else b""
                into = memoryview(tail if last else taken)[done : done + len(ids) * DIGEST_BYTES]
                digest_s = wire.send(head, blocks(region, ids), tail, into if header.digest else None)
            meter.digested(digest_s)
            head, done = b"", done + len(into)

    @staticmethod
    def _send_block(wire: Wire, memory: KvRegion, block_id: int, *, digest: bool) -> None:
        """`_send_inline` of a single block, which is over before arrays of it were made."""
        failpoints.hit("source.sending")
        block, taken = memory.block(block_id), b""
        if digest:
            began_s = time.perf_counter()
            taken = xxhash.xxh3_64_digest(block)
            meter.digested(time.perf_counter() - began_s)
        wire.send_views([frames.encode_accepted(), block, taken + frames.TRAILER])

    # ---- along the computation ----

    def _answer_along(
        self, wire: Wire, header: PullHeader, transfer_id: str, first_block: int, num_layers: int
    ) -> None:
        """`num_layers` can be told apart in the receiver's blocks. If not in ours, each block is sent as a whole."""
        try:
            allocation, progress = self._leases.progress(transfer_id, header.epoch)
            memory = self._readable(header, transfer_id, int(allocation.block_ids[-1]))
            _check_along(allocation, first_block, header.num_blocks, num_layers)
            self._send_accepted(wire, memory)
        except SageError as err:
            wire.send(frames.encode_refusal(err.reason, err.message))
            return
        layer_bytes, now = memory.block_bytes // num_layers, self._settings.now
        segment_bytes = progress.segment_bytes or now.segment_min_bytes
        cutter = SegmentCutter(
            first_block,
            progress.num_tokens,
            progress.block_size_tokens,
            num_layers,
            min_block_layers=-(-segment_bytes // layer_bytes),
        )
        try:
            for segment in self._ready(wire, progress, cutter, by_layer=num_layers == layers_apart(memory) > 1):
                for part in split(segment, layer_bytes, now.chunk_bytes or frames.GROUP_BYTES):
                    block_ids = allocation.block_ids[part.first_block : part.end_block]
                    num_bytes = part.num_blocks * memory.block_bytes * part.num_layers // num_layers
                    with (
                        self._leases.reading(transfer_id, header.epoch, block_ids, num_bytes),
                        memory.reading(block_ids) as (region, ids),
                    ):
                        self._send_segment(wire, part, of_segment(region, ids, part, num_layers), digest=header.digest)
                    failpoints.hit("source.sending")
        except SageError as err:
            failed = frames.encode_segment(frames.SEGMENT_FAILED)
            wire.send(failed + frames.encode_refusal(err.reason, err.message))
            return
        wire.send(frames.encode_segment(frames.SEGMENT_DONE) + deviation_of(memory))

    def _ready(self, wire: Wire, progress: KvProgress, cutter: SegmentCutter, *, by_layer: bool) -> Iterator[Segment]:
        """Segments as they become ready, to the last one. Raises what the computation failed with."""
        patience_s, mark = min(WAIT_S, self._silence_s / 3), None
        while not cutter.finished:
            seen, mark = mark, progress.wait(mark, patience_s)
            if mark == seen:
                wire.send(frames.encode_segment(frames.SEGMENT_WAIT))
            else:
                yield from cutter.cut(mark if by_layer else Watermark(mark.tokens))


def _check_along(allocation: Allocation, first_block: int, num_blocks: int, num_layers: int) -> None:
    if num_layers < 1:
        raise InvalidRequest(f"num_layers is {num_layers}, but must be at least 1")
    if first_block < 0 or first_block + num_blocks != len(allocation.block_ids):
        raise InvalidRequest(
            f"{num_blocks} blocks from {first_block} on are not the rest of the {len(allocation.block_ids)} leased ones"
        )


def send_places(wire: Wire, segment: Segment, pieces: Pieces, *, digest: bool) -> None:
    """A segment of which the receiver fetches the bytes itself: held until it has."""
    header = frames.encode_segment(frames.SEGMENT_DATA, segment)
    wire.send(header + frames.encode_pieces(pieces.offsets, pieces.sizes))
    taken = bytes(DIGEST_BYTES)
    if digest:
        with meter.source_digesting():
            taken = segment_digest(pieces)
    expect_copied(wire, 1)
    wire.send(taken)


def expect_copied(wire: Wire, num_groups: int) -> None:
    """Raises what `Wire.recv` does when the receiver is gone, or copies no more: nobody reads the blocks then, or what
    they read they will not be told to be right."""
    told = wire.recv(num_groups)
    if told != frames.COPIED * num_groups:
        raise MalformedFrame(f"is followed by {bytes(told)!r} instead of what was copied")


def deviation_of(memory: KvMemory) -> bytes:
    """What ends a transfer in another dtype than the pool's."""
    return frames.encode_deviation(memory.deviation) if isinstance(memory, Outgoing) else b""
