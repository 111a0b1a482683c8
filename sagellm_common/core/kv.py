"""KV memory as the pools, the byte paths and the engines share it."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import numpy as np

from sagellm_common.core.types import AT_HAND, BlockHash, BlockIds, KvConversion, KvOrigins


class Tier(enum.IntEnum):
    """Where a block is kept, the fastest first. A smaller number is nearer to the computation."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    STORE = 3


class KvMemory(Protocol):
    """The KV memory of a pool, wherever it is. Byte paths see a few blocks of it at a time, as host memory.

    A block's bytes are the same on every device: all layers' keys, then all layers' values.
    """

    @property
    def block_bytes(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    def reading(self, block_ids: BlockIds) -> AbstractContextManager[tuple[KvRegion, BlockIds]]:
        """Host memory with the blocks' bytes: block block_ids[i] is number ids[i] of the region. Not to be written.

        May copy, and block meanwhile. Any thread may call it; what it yields ends with the context.
        """

    def writing(self, block_ids: BlockIds) -> AbstractContextManager[tuple[KvRegion, BlockIds]]:
        """Host memory to be filled, as in `reading`. Left without an error, the blocks have what it holds.

        Left with one they may have it or not. Blocks are named once each.
        """


@dataclass(frozen=True, slots=True)
class LayerPart:
    """One kind of a block's contents (keys, values, scales): from `offset` on, layer after layer of `layer_bytes`."""

    offset: int
    layer_bytes: int


@dataclass(frozen=True, slots=True)
class KvRegion:
    """KV memory of the host: a `KvMemory` in place. One block is contiguous.

    `view` is a writable memoryview of num_blocks x block_bytes bytes; block b starts at b * block_bytes. The byte
    path reads and writes it in place. `layer_parts` say where in a block a layer is; empty: blocks have no layers
    that could be read apart. `descriptor` is an open file that begins with the view's bytes, for other processes to map
    (`shared_memory`); None: the memory is this process's own.
    """

    view: memoryview
    block_bytes: int
    num_blocks: int
    layer_parts: tuple[LayerPart, ...] = ()
    descriptor: int | None = None
    address: int = field(init=False, repr=False, compare=False)
    """Of the view, in this process: looked up once, for that takes longer than copying a small block."""

    def __post_init__(self) -> None:
        begin = np.frombuffer(self.view, dtype=np.uint8).__array_interface__["data"][0] if len(self.view) else 0
        object.__setattr__(self, "address", begin)

    @property
    def num_layers(self) -> int:
        """Layers that can be read apart; 1 where `layer_parts` is empty."""
        return self.block_bytes // sum(p.layer_bytes for p in self.layer_parts) if self.layer_parts else 1

    @contextmanager
    def reading(self, block_ids: BlockIds) -> Iterator[tuple[KvRegion, BlockIds]]:
        """See `KvMemory`; nothing is copied."""
        yield self, block_ids

    writing = reading

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside the pool of {self.num_blocks} blocks")
        start = block_id * self.block_bytes
        return self.view[start : start + self.block_bytes]

    def runs(self, block_ids: Sequence[int] | BlockIds) -> list[memoryview]:
        """Views of the blocks in order, neighbours in memory merged into one view."""
        ids = np.asarray(block_ids, dtype=np.int64)
        if ids.size == 0:
            return []
        if ids.min() < 0 or ids.max() >= self.num_blocks:
            raise IndexError(f"blocks {ids.min()}..{ids.max()} are outside the pool of {self.num_blocks} blocks")
        cuts = np.flatnonzero(np.diff(ids) != 1) + 1
        bounds = [0, *cuts.tolist(), ids.size]
        size = self.block_bytes
        return [self.view[int(ids[a]) * size : (int(ids[a]) + b - a) * size] for a, b in itertools.pairwise(bounds)]

    def layers(self, block_ids: Sequence[int] | BlockIds, begin: int, end: int) -> list[memoryview]:
        """Views of layers [begin, end) of the blocks, block after block, each in the order of `layer_parts`."""
        spans = [(p.offset + begin * p.layer_bytes, p.offset + end * p.layer_bytes) for p in self.layer_parts]
        starts = (np.asarray(block_ids, dtype=np.int64) * self.block_bytes).tolist()
        return [self.view[at + first : at + last] for at in starts for first, last in spans]


@dataclass(slots=True, eq=False)
class Allocation:
    """References on blocks in token order, held by whoever has this object until it gives it to `free`.

    The first `num_cached_tokens` tokens have valid KV: from the prefix cache at allocation, and from whoever filled
    blocks and raised the number since; `conversion` is what those had lost where they were kept, and `origins` where
    that was. The leading `num_shared_blocks` are shared and must not be written. `more_below`: slower memory has more
    of it, for `KVBackendProtocol.bring_back`.
    """

    block_ids: BlockIds
    num_cached_tokens: int = 0
    num_shared_blocks: int = 0
    conversion: KvConversion | None = field(default=None, kw_only=True)
    origins: KvOrigins = field(default=AT_HAND, kw_only=True)
    more_below: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Blocks that became available for reuse in a tier, or ceased to be there.

    Blocks of one prefix come in token order. `tier` None: the one in which the pool keeps everything. A block that
    moves is told twice: stored where it is now, then removed from where it was. `depths` are the numbers of the stored
    ones in their sequences; empty: not known.
    """

    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    tier: Tier | None = None
    depths: tuple[int, ...] = field(default=(), compare=False)


@runtime_checkable
class TieredCache(Protocol):
    """A pool of several tiers: its events name theirs, and so does what a new watcher is told."""

    def cached_by_tier(self) -> Mapping[Tier, list[BlockHash]]:
        """Hashes of all blocks that can be found in each tier; one that is in two is in both lists."""


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block of a pool. `block_id` is its place in memory, as in `Allocation.block_ids`.

    `ref_count` counts its holders, the prefix cache (which knows it by `block_hash`) among them. A pinned one stays
    where it is: somebody else knows the place, or computes there.
    """

    block_id: int
    ref_count: int
    block_hash: BlockHash | None
    pinned: bool
    tenant: str


@dataclass(frozen=True, slots=True, eq=False)
class BlockMoves:
    """Blocks of one pool to be moved within it, from place sources[i] to place destinations[i]; all places differ."""

    sources: BlockIds
    destinations: BlockIds

    @classmethod
    def none(cls) -> Self:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32))


@dataclass(frozen=True, slots=True)
class KvFragmentation:
    """How much of a pool's memory is there and of no use.

    `internal`: token slots in held blocks that are for no token / token slots in held blocks (internal fragmentation of
    Kwon et al., PagedAttention, SOSP 2023, section 3.1; the last block of a table is seldom full). `external`:
    1 - longest free run / free blocks (Johnstone and Wilson, The Memory Fragmentation Problem: Solved?, ISMM 1998,
    discuss it): 0 when all free blocks lie in a row. A paged pool can use them however they lie.
    """

    internal: float
    external: float
    free_blocks: int
    longest_free_run_blocks: int
