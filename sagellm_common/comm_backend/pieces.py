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
    parts: Offsets | None = None
    """The first parts[0] of them are what one digest is of, then the next parts[1] …; None: each has its own."""

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

    # What one digest is of is a unit: a piece, or several that lie apart.

    @property
    def unit_sizes(self) -> Offsets:
        if self.parts is None:
            return self.sizes
        found: Offsets = np.add.reduceat(self.sizes, self._firsts(self.parts))
        return found

    def within_units(self, begins: Offsets) -> Offsets:
        """Where the pieces' bytes are in memory that has units in one piece each: unit i from begins[i] on."""
        if self.parts is None:
            return begins
        before = np.cumsum(self.sizes) - self.sizes
        found: Offsets = np.repeat(begins - before[self._firsts(self.parts)], self.parts) + before
        return found

    @staticmethod
    def _firsts(parts: Offsets) -> Offsets:
        return np.cumsum(parts) - parts

    def __getitem__(self, part: slice) -> Pieces:
        """Of pieces that have digests of their own."""
        return Pieces(self.memory, self.offsets[part], self.sizes[part], self.region)


def checked(memory: memoryview, offsets: Offsets, sizes: Offsets) -> Pieces:
    """Raises IndexError unless all pieces lie within the memory: from here on nobody looks again."""
    if len(offsets) and (offsets.min() < 0 or sizes.min() < 0 or (offsets + sizes).max() > len(memory)):
        raise IndexError(f"bytes {offsets.min()}..{(offsets + sizes).max()} are outside of a memory of {len(memory)}")
    return Pieces(memory, offsets, sizes)


def in_order(memory: memoryview, count: int, size: int) -> Pieces:
    """`count` pieces of `size` bytes, one after the other from the beginning of the memory on."""
    return Pieces(memory, np.arange(count, dtype=np.int64) * size, np.full(count, size, dtype=np.int64))


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
    """8-byte xxh3 of each piece (or of each group of `parts`), in order."""
    library = native.library()
    if library is not None and len(pieces.sizes) >= FEW:
        found = _native(library, pieces, None, digest=True)
        if found is not None:
            return found
    views = pieces.views()
    if pieces.parts is None:
        return b"".join([xxhash.xxh3_64_digest(view) for view in views])
    found, begin = b"", 0
    for count in pieces.parts.tolist():
        digest = xxhash.xxh3_64()
        for view in views[begin : begin + count]:
            digest.update(view)
        found, begin = found + digest.digest(), begin + count
    return found


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
        taken = _native(library, source, target, digest=digest)
        if taken is not None:
            return taken
        _native(library, source, target, digest=False)
    return digests(target) if digest else b""


def _native(library: native.Library, source: Pieces, target: Pieces | None, *, digest: bool) -> bytes | None:
    """Without the GIL. None, and nothing is done, for digests that it does not know. Those are the target's `parts`."""
    parts = (target or source).parts
    found = np.empty(len((target or source).sizes if parts is None else parts) if digest else 0, dtype=np.uint64)
    done = library.sage_pieces(
        source.address,
        pointer(source.offsets),
        target.address if target else None,
        pointer(target.offsets) if target else None,
        pointer(source.sizes),
        len(source.sizes),
        pointer(parts) if parts is not None else None,
        pointer(found) if digest else None,
        library.isas[-1],
    )
    return found.tobytes() if done else None


def address_of(memory: memoryview | bytes | bytearray) -> int:
    """Where it is in this process. Keep it alive."""
    return pointer(np.frombuffer(memory, dtype=np.uint8)) if memory else 0


def pointer(array: NDArray[np.generic]) -> int:
    """Of a contiguous array, which the caller keeps alive."""
    address: int = array.__array_interface__["data"][0]
    return address
