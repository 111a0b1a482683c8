"""Which kv_store keeps which blocks: rendezvous hashing of extents.

    sequence  | extent 0: 32 blocks | extent 1: 32 blocks | ext…        key: hash of the extent's first block
    stores    |  b, then a          |  a, then c          |  c, then b  ranked by hash(store, key), `replicas` keep it

The unit is an extent, not a block: a prompt of 2000 tokens asks four stores and pulls from four at most, instead of
scattering every 16 tokens over all of them. It is not the whole prompt either: long prompts are spread, and pulled in
parallel. Chained hashes make an extent's first block name its whole prefix, so one prefix is at one place, whoever
asks, and two prompts part where their extents do.

Rendezvous (highest random weight: Thaler and Ravishankar, 1998) instead of a ring: no virtual nodes to tune, and when a
store joins or leaves only what it gains or had moves, 1/n of all. Ranking costs one hash per store and extent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from sagellm_common.core.types import BlockHash

EXTENT_BLOCKS = 32
"""All workers and stores must agree on it."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Blocks [first, stop) of a sequence, all of the extent whose first block's hash is `key`."""

    key: BlockHash
    first: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return self.stop - self.first

    @property
    def offset(self) -> int:
        """Of `first` within the extent."""
        return self.first % EXTENT_BLOCKS


def extents(hashes: Sequence[BlockHash], first: int = 0, stop: int | None = None) -> list[Extent]:
    """Blocks [first, stop) of a sequence by extent; `hashes` are those of all its blocks from the very first on."""
    stop = len(hashes) if stop is None else stop
    found = []
    while first < stop:
        begin = first - first % EXTENT_BLOCKS
        found.append(Extent(hashes[begin], first, min(stop, begin + EXTENT_BLOCKS)))
        first = begin + EXTENT_BLOCKS
    return found


def ranked(key: BlockHash, store_ids: Iterable[str]) -> list[str]:
    """The stores in the order in which they are to keep this extent: the first `replicas` of them do."""
    return sorted(store_ids, key=lambda store_id: (-xxhash.xxh3_64_intdigest(key + store_id.encode()), store_id))
