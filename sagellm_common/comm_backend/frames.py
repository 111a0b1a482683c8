"""What byte paths over stream sockets say on the wire, before and around the blocks. All integers are little-endian.

receiver → source   request   magic, version, op, flags, dtype (0: as the blocks are, or a place in kv_dtypes.NAMES
                              from 1 on), len(transfer_id), tokens of the last block, timeout_ms, epoch, num_blocks,
                              block_bytes (on the wire), group_blocks
                              transfer_id (UTF-8); pull: block ids (int32 each), along: first block, layers (int32)
source → receiver   answer    magic, status, len(reason), len(message); reason and message when refused
                    then, when accepted,
             pull   the blocks, group_blocks at a time, and the digests of all (8 bytes each, if asked for)
                    trailer   magic: all was sent and the lease was held until here; for another dtype the deviation
            along   for each segment of blocks x layers that has become ready:
                    segment   kind, layers, blocks; data: digest (8 bytes, if asked for) and the bytes, block after
                              block; wait: nothing yet; done: all was sent, and for another dtype the deviation;
                              failed: an answer that refuses

A pull inline is a pull over whatever the socket is. Any other over shm brings no block through it: the receiver copies
them out of the source's memory, which the source holds for it until it hears so:

source → receiver   after an answer that accepts: memory   kind, id, bytes, address; its file with the first answer
             pull   receiver → source   copied, one byte for each group
                    source → receiver   digests of all blocks (if asked for), trailer: held until here
            along   after a data segment's header: number of pieces, their offsets, their sizes (int64 each)
                    receiver → source   copied
                    source → receiver   digest (zeros, if not asked for): held until here
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm_common.comm_backend.kv_dtypes import NAMES, Deviation
from sagellm_common.comm_backend.protocol import Encoding
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.core.types import BlockIds, pack_int32

MAGIC = b"SKVT"
TRAILER = b"SKVE"
VERSION = 2
OP_PULL, OP_ALONG, OP_INLINE = 1, 2, 3
OPS = (OP_PULL, OP_ALONG, OP_INLINE)
SEGMENT_DATA, SEGMENT_WAIT, SEGMENT_DONE, SEGMENT_FAILED = 1, 2, 3, 4
FLAG_DIGEST = 1
ACCEPTED, REFUSED = 0, 1
GROUP_BYTES = 2 << 20
"""Unless configured, and where a group is staged: what is done with it next finds it in a cache."""
IN_PLACE_GROUP_BYTES = 4 << 20
"""The same where it is not: arranging one then costs a few percent of moving it. Over shm the death of the other side
goes unnoticed while one is copied, a millisecond."""
MAX_GROUP_BYTES = 64 << 20
"""No receiver makes a source stage any more at a time (but for one block)."""
MAX_GROUP_BLOCKS = 1000
"""Below IOV_MAX (1024) together with what goes before and after."""
MAX_TIMEOUT_MS = 600_000
"""No receiver makes a source hold blocks for it any longer."""

REQUEST = struct.Struct("<4sBBBBHHIqIQHxx")
ANSWER = struct.Struct("<4sBxHI")
ALONG = struct.Struct("<ii")
PIECES = struct.Struct("<I")
SEGMENT = struct.Struct("<BxHHxxII")
MEMORY = struct.Struct("<BxxxxxxxQQQ")
MEMORY_FILE, MEMORY_ADDRESS = 1, 2
COPIED = b"\x06"
DEVIATION = struct.Struct("<dddQ")


NO_SEGMENT = Segment(0, 0, 0, 0)


class MalformedFrame(Exception):
    """The other side does not speak this protocol; the connection is of no further use."""


@dataclass(frozen=True, slots=True)
class PullHeader:
    """The fixed part of a request."""

    op: int
    digest: bool
    transfer_id_bytes: int
    timeout_ms: int
    epoch: int
    num_blocks: int
    block_bytes: int
    encoding: Encoding | None
    group_blocks: int


def encode_pull(
    transfer_id: str,
    epoch: int,
    block_ids: BlockIds,
    *,
    block_bytes: int,
    digest: bool,
    timeout_s: float,
    group_blocks: int | None = None,
    encoding: Encoding | None = None,
    inline: bool = False,
) -> bytes:
    """`group_blocks` None: as many as GROUP_BYTES take."""
    if group_blocks is None:
        group_blocks = max(1, min(MAX_GROUP_BLOCKS, GROUP_BYTES // block_bytes))
    count = len(block_ids)
    op = OP_INLINE if inline else OP_PULL
    header = _encode_header(op, transfer_id, epoch, count, block_bytes, digest, timeout_s, encoding, group_blocks)
    return header + pack_int32(block_ids)


def encode_along(
    transfer_id: str,
    epoch: int,
    first_block: int,
    num_blocks: int,
    num_layers: int,
    *,
    block_bytes: int,
    digest: bool,
    timeout_s: float,
    encoding: Encoding | None = None,
) -> bytes:
    """Asks for num_blocks blocks from first_block on, in token order: all that are left."""
    header = _encode_header(OP_ALONG, transfer_id, epoch, num_blocks, block_bytes, digest, timeout_s, encoding)
    return header + ALONG.pack(first_block, num_layers)


def _encode_header(
    op: int,
    transfer_id: str,
    epoch: int,
    num_blocks: int,
    block_bytes: int,
    digest: bool,
    timeout_s: float,
    encoding: Encoding | None,
    group_blocks: int = 1,
) -> bytes:
    name = transfer_id.encode()
    flags = FLAG_DIGEST if digest else 0
    timeout_ms = max(1, min(MAX_TIMEOUT_MS, int(timeout_s * 1000)))
    dtype = 1 + NAMES.index(encoding.dtype) if encoding else 0
    last = encoding.last_block_tokens if encoding else 0
    sizes = (timeout_ms, epoch, num_blocks, block_bytes, group_blocks)
    fixed = (MAGIC, VERSION, op, flags, dtype, len(name), last, *sizes)
    return REQUEST.pack(*fixed) + name


def decode_request(header: bytes | bytearray, max_blocks: int) -> PullHeader:
    """Raises MalformedFrame, also for more blocks than the pool has: nothing is allocated for such a request."""
    magic, version, op, flags, dtype, name_bytes, last, *sizes = REQUEST.unpack(header)
    timeout_ms, epoch, num_blocks, block_bytes, group_blocks = sizes
    if magic != MAGIC:
        raise MalformedFrame(f"starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION or op not in OPS:
        raise MalformedFrame(f"has version {version} op {op}; known: version {VERSION} op {', '.join(map(str, OPS))}")
    if not 0 < num_blocks <= max_blocks:
        raise MalformedFrame(f"asks for {num_blocks} blocks of a pool of {max_blocks}")
    if dtype > len(NAMES):
        raise MalformedFrame(f"asks for dtype {dtype}; known are 0 to {len(NAMES)}")
    if not 0 < group_blocks <= max_group_blocks(block_bytes):
        raise MalformedFrame(f"asks for groups of {group_blocks} blocks of {block_bytes} bytes")
    return PullHeader(
        op,
        bool(flags & FLAG_DIGEST),
        name_bytes,
        min(timeout_ms, MAX_TIMEOUT_MS),
        epoch,
        num_blocks,
        block_bytes,
        Encoding(NAMES[dtype - 1], block_bytes, last) if dtype else None,
        group_blocks,
    )


def encode_deviation(deviation: Deviation) -> bytes:
    return DEVIATION.pack(deviation.max_abs, deviation.squares, deviation.number_squares, deviation.non_finite)


def decode_deviation(packed: bytes | bytearray) -> Deviation:
    return Deviation(*DEVIATION.unpack(packed))


def encode_segment(kind: int, segment: Segment = NO_SEGMENT) -> bytes:
    return SEGMENT.pack(kind, segment.first_layer, segment.end_layer, segment.first_block, segment.end_block)


def decode_segment(header: bytes | bytearray) -> tuple[int, Segment]:
    """(kind, what it brings). Raises MalformedFrame."""
    kind, first_layer, end_layer, first_block, end_block = SEGMENT.unpack(header)
    known = (SEGMENT_DATA, SEGMENT_WAIT, SEGMENT_DONE, SEGMENT_FAILED)
    if kind not in known or first_layer > end_layer or first_block > end_block:
        raise MalformedFrame(f"sent the segment {bytes(header)!r}")
    return kind, Segment(first_block, end_block, first_layer, end_layer)


def encode_pieces(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> bytes:
    return PIECES.pack(len(offsets)) + offsets.astype("<i8").tobytes() + sizes.astype("<i8").tobytes()


def decode_pieces(packed: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(offsets, sizes), from what follows the number of them."""
    offsets, sizes = np.frombuffer(packed, dtype="<i8").reshape(2, -1)
    return offsets, sizes


def encode_refusal(reason: str, message: str) -> bytes:
    why, text = reason.encode(), message.encode()[:4096]
    return ANSWER.pack(MAGIC, REFUSED, len(why), len(text)) + why + text


ACCEPTED_ANSWER = ANSWER.pack(MAGIC, ACCEPTED, 0, 0)


def encode_accepted() -> bytes:
    return ACCEPTED_ANSWER


def decode_answer(header: bytes | bytearray) -> tuple[bool, int, int]:
    """(accepted, bytes of the reason, bytes of the message). Raises MalformedFrame."""
    magic, status, reason_bytes, message_bytes = ANSWER.unpack(header)
    if magic != MAGIC or status not in (ACCEPTED, REFUSED) or reason_bytes > 256 or message_bytes > 8192:
        raise MalformedFrame(f"answered with {bytes(header)!r}")
    return status == ACCEPTED, reason_bytes, message_bytes


def max_group_blocks(block_bytes: int) -> int:
    """The most blocks of this size that a group may have, however large it is wished."""
    return max(1, min(MAX_GROUP_BLOCKS, MAX_GROUP_BYTES // max(1, block_bytes)))


def groups(block_ids: BlockIds, group_blocks: int) -> list[BlockIds]:
    """The blocks in groups: the same on both sides."""
    return [block_ids[at : at + group_blocks] for at in range(0, len(block_ids), group_blocks)]


def unpack_ids(packed: bytes | bytearray) -> BlockIds:
    return np.frombuffer(packed, dtype="<i4")
