"""Digests and bounds of blocks on their way: the same checks on every byte path."""

from __future__ import annotations

import xxhash

from sagellm_common.comm_backend.pieces import Pieces, blocks, digests
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.core.errors import InvalidRequest, KvCorrupt
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds

DIGEST_BYTES = 8


def block_digests(region: KvRegion, block_ids: BlockIds) -> bytes:
    """8-byte xxh3 of each block, in order."""
    return digests(blocks(region, block_ids))


def segment_digest(pieces: Pieces) -> bytes:
    """8-byte xxh3 of the xxh3 of a segment's pieces, in the order in which they are sent."""
    return digest_of(digests(pieces))


def digest_of(piece_digests: bytes) -> bytes:
    return xxhash.xxh3_64_digest(piece_digests)


def verify_segment(segment: Segment, actual: bytes, expected: bytes | bytearray, transfer_id: str) -> None:
    """Raises KvCorrupt naming the segment when its bytes are not what the source sent."""
    if actual != expected:
        raise KvCorrupt(
            f"transfer {transfer_id!r}: layers {segment.first_layer}..{segment.end_layer - 1} of blocks "
            f"{segment.first_block}..{segment.end_block - 1} arrived with digest {actual.hex()}, sent as "
            f"{bytes(expected).hex()}",
            metadata={"transfer_id": transfer_id, "first_block": str(segment.first_block)},
        )


def verify_digests(actual: bytes, expected: bytes | bytearray, block_ids: BlockIds, transfer_id: str) -> None:
    """Raises KvCorrupt naming the first block whose bytes are not what the source sent."""
    if actual == expected:
        return
    for n, block_id in enumerate(block_ids.tolist()):
        part = slice(n * DIGEST_BYTES, (n + 1) * DIGEST_BYTES)
        if actual[part] != expected[part]:
            raise KvCorrupt(
                f"transfer {transfer_id!r}: block {block_id} arrived with digest {actual[part].hex()}, "
                f"sent as {bytes(expected[part]).hex()}",
                metadata={"transfer_id": transfer_id, "block_id": str(block_id)},
            )
    raise KvCorrupt(f"transfer {transfer_id!r}: {len(expected)} bytes of digests for {len(block_ids)} blocks")


def check_pull(region: KvMemory, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
    """Raises InvalidRequest unless each source block has one target block of its own within the pool."""
    if len(source_blocks) != len(target_blocks):
        raise InvalidRequest(f"{len(source_blocks)} source blocks cannot fill {len(target_blocks)} target blocks")
    check_targets(region, target_blocks)


def check_targets(region: KvMemory, target_blocks: BlockIds) -> None:
    """Raises InvalidRequest unless they are different blocks within the pool."""
    ids = target_blocks.tolist()
    if not ids:
        return
    first, last = min(ids), max(ids)
    if first < 0 or last >= region.num_blocks:
        raise InvalidRequest(f"target blocks {first}..{last} are outside the pool of {region.num_blocks}")
    if len(set(ids)) != len(ids):
        raise InvalidRequest("a target block is named twice: each block can be filled once")
