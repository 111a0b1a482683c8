"""What goes before each message on a group's link, so that one that is lost, doubled, late or changed is noticed."""

from __future__ import annotations

import struct

import xxhash

from sagellm_common.core.errors import KvCorrupt, PeerLost

_HEAD = struct.Struct("<QQ8s")
"""Number of the message on its stream, bytes, xxh3 of them."""
HEAD_BYTES = _HEAD.size


def encode_head(number: int, payload: memoryview) -> bytes:
    return _HEAD.pack(number, len(payload), xxhash.xxh3_64_digest(payload))


def check_head(head: bytes | bytearray, number: int, num_bytes: int) -> bytes:
    """The digest of the message number `number`, of num_bytes. Raises PeerLost when another one comes."""
    theirs, size, digest = _HEAD.unpack(head)
    if theirs != number:
        raise PeerLost(f"message {theirs} of a member came in the place of message {number}: one was lost or repeated")
    if size != num_bytes:
        raise PeerLost(f"a member sent {size} bytes where it had announced {num_bytes}")
    return bytes(digest)


def check_payload(payload: memoryview, digest: bytes) -> None:
    """Raises KvCorrupt unless the bytes are those sent."""
    if xxhash.xxh3_64_digest(payload) != digest:
        raise KvCorrupt(f"{len(payload)} bytes of a member arrived with other contents than they were sent with")
