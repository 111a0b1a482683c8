"""KV memory cut into runs of bytes, as arrays: what costs time per block is done for all of them in one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from sagellm_common.comm_backend import native
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds

Offsets = NDArray[np.int64]
Vectors = NDArray[np.uint64]
"""[n, 2]: address and length of each run, a `struct iovec` array."""

SHORTEST_NATIVE_BYTES = 241
"""What is shorter has another algorithm in XXH3, and is left to Python's xxhash."""

FEW = 3
"""Fewer pieces are done one by one before the library is asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """sizes[i] bytes of `memory` from offsets[i] on, in the order of the wire. All within `memory`, see `checked`."""

    memory: memoryview
    offsets: Offsets
    sizes: Offsets
    region: KvRegion | None = None
    """Whose memory it is, if known: it knows where that is."""

    @property
    def address(self) -> int:
        """Of the memory, in this process."""
        return self.region.address if self.region is not None else address_of(self.memory)

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())

    def vectors(self, address: int | None = None, *, before: bool = False, after: bool = False) -> Vectors:
        """Neighbours in memory are merged. Keep `memory` alive; `address` is where it is, if not in this process.

        With `before` and `after` there is room for one more at that end.
        """
        starts, sizes = self.offsets, self.sizes
        if len(starts) > 1:
            ends = starts + sizes
            firsts = np.concatenate([[0], np.flatnonzero(starts[1:] != ends[:-1]) + 1])
            if len(firsts) < len(starts):
                starts = starts[firsts]
                sizes = ends[np.append(firsts[1:], len(ends)) - 1] - starts
        if len(starts) == 1:
            begin = int(starts[0]) + (self.address if address is None else address)
            room = [0, 0]
            return np.array([*[room] * before, [begin, int(sizes[0])], *[room] * after], dtype=np.uint64)
        found = np.empty((before + len(starts) + after, 2), dtype=np.uint64)
        inner = found[int(before) : before + len(starts)]
        inner[:, 0] = starts
        inner[:, 0] += np.uint64(self.address if address is None else address)
        inner[:, 1] = sizes
        return found

    def views(self) -> list[memoryview]:
        """For few of them."""
        bounds = zip(self.offsets.tolist(), self.sizes.tolist(), strict=True)
        return [self.memory[at : at + size] for at, size in bounds]

    def __getitem__(self, part: slice) -> Pieces:
        return Pieces(self.memory, self.offsets[part], self.sizes[part], self.region)


def checked(memory: memoryview, offsets: Offsets, sizes: Offsets) -> Pieces:
    """Raises IndexError unless all pieces lie within the memory: from here on nobody looks again."""
    if len(offsets) and (offsets.min() < 0 or sizes.min() < 0 or (offsets + sizes).max() > len(memory)):
        raise IndexError(f"bytes {offsets.min()}..{(offsets + sizes).max()} are outside of a memory of {len(memory)}")
    return Pieces(memory, offsets, sizes)


def blocks(region: KvRegion, block_ids: BlockIds) -> Pieces:
    """A piece per block. Raises IndexError outside the pool."""
    size = region.block_bytes
    if len(block_ids) == 1 and 0 <= (at := int(block_ids[0])) < region.num_blocks:
        return Pieces(region.view, np.array([at * size]), np.array([size]), region)
    if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < region.num_blocks:
        raise IndexError(
            f"blocks {block_ids.min()}..{block_ids.max()} are outside the pool of {region.num_blocks} blocks"
        )
    offsets = block_ids.astype(np.int64) * size
    return Pieces(region.view, offsets, np.full(len(block_ids), size, dtype=np.int64), region)


def of_segment(region: KvRegion, block_ids: BlockIds, segment: Segment, num_layers: int) -> Pieces:
    """A piece per block, or, where the segment has only some of num_layers layers, per block and kind of content
    (keys, values, scales: `KvRegion.layer_parts`). Raises IndexError outside the pool."""
    whole = blocks(region, block_ids)
    if segment.num_layers == num_layers:
        return whole
    begins = np.array([part.offset + segment.first_layer * part.layer_bytes for part in region.layer_parts])
    sizes = np.array([segment.num_layers * part.layer_bytes for part in region.layer_parts])
    offsets = (whole.offsets[:, None] + begins[None, :]).reshape(-1)
    return checked(region.view, offsets, np.tile(sizes, len(block_ids)))


def digests(pieces: Pieces) -> bytes:
    """8-byte xxh3 of each piece, in order."""
    library = native.library()
    if library is None or len(pieces.sizes) < FEW or pieces.sizes.min() < SHORTEST_NATIVE_BYTES:
        return b"".join([xxhash.xxh3_64_digest(view) for view in pieces.views()])
    return _native(library, pieces, None, digest=True)


def copy(source: Pieces, target: Pieces, *, digest: bool) -> bytes:
    """Fills target's pieces, each as long as the source's; with `digest` the `digests` of what was written."""
    if not np.array_equal(source.sizes, target.sizes):
        raise ValueError("pieces of different sizes cannot be copied")
    library = native.library()
    if library is None:
        bounds = zip(source.offsets.tolist(), target.offsets.tolist(), source.sizes.tolist(), strict=True)
        for at, to, size in bounds:
            target.memory[to : to + size] = source.memory[at : at + size]
    elif len(source.sizes):
        fused = digest and bool(source.sizes.min() >= SHORTEST_NATIVE_BYTES)
        taken = _native(library, source, target, digest=fused)
        if fused:
            return taken
    return digests(target) if digest else b""


def _native(library: native.Library, source: Pieces, target: Pieces | None, *, digest: bool) -> bytes:
    """Without the GIL."""
    found = np.empty(len(source.sizes) if digest else 0, dtype=np.uint64)
    library.sage_pieces(
        source.address,
        pointer(source.offsets),
        target.address if target else None,
        pointer(target.offsets) if target else None,
        pointer(source.sizes),
        len(source.sizes),
        pointer(found) if digest else None,
        library.isas[-1],
    )
    return found.tobytes()


def address_of(memory: memoryview | bytes | bytearray) -> int:
    """Where it is in this process. Keep it alive."""
    return pointer(np.frombuffer(memory, dtype=np.uint8)) if memory else 0


def pointer(array: NDArray[np.generic]) -> int:
    """Of a contiguous array, which the caller keeps alive."""
    address: int = array.__array_interface__["data"][0]
    return address
