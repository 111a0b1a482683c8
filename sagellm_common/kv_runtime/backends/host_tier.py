"""Host memory as a tier: a `HostKvPool`, which others are served from in place, seen as blocks to copy in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import BlockEvent, KvRegion, Tier
from sagellm_common.core.types import BlockHash, BlockIds, KvTierStats
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.tiers import BlockKey


@dataclass(slots=True)
class Filling:
    """Blocks of the region to be filled with `keys`, the first `num_filled` of which become stored."""

    keys: Sequence[BlockKey]
    region: KvRegion
    block_ids: BlockIds
    num_filled: int = 0


class HostTier:
    """A `TierBackend` over a pool that has its layout. Others may use the pool meanwhile.

    With `holding` and `filling` its blocks are read and written where they are.
    """

    def __init__(self, pool: HostKvPool, name: str = "dram") -> None:
        self.name = name
        self.kind = Tier.HOST
        self.exact = True
        self.pool = pool

    @property
    def block_bytes(self) -> int:
        return self.pool.layout.block_bytes

    @contextmanager
    def holding(self, hashes: Sequence[BlockHash]) -> Iterator[tuple[list[BlockKey], KvRegion, BlockIds]]:
        """Those of the blocks that are here; they stay meanwhile."""
        keys, allocation = self.pool.hold(hashes)
        try:
            yield keys, self.pool.regions(), allocation.block_ids
        finally:
            self.pool.free(allocation)

    @contextmanager
    def filling(self, keys: Sequence[BlockKey]) -> Iterator[Filling]:
        """Room for those of the blocks that are not here, for as many of the first of them as there is."""
        put = self.pool.begin_put_of(keys)
        filling = Filling(put.keys, self.pool.regions(), put.allocation.block_ids)
        try:
            yield filling
            self.pool.commit_put(put, filling.num_filled)
        finally:
            self.pool.abort_put(put)

    # ---- TierBackend ----

    def holds(self, hashes: Sequence[BlockHash]) -> list[bool]:
        return self.pool.holds(hashes)

    def hashes(self) -> list[BlockHash]:
        return self.pool.cached_hashes()

    def keys(self, hashes: Sequence[BlockHash]) -> list[BlockKey]:
        with self.holding(hashes) as (keys, _, _):
            return keys

    def used(self, hashes: Sequence[BlockHash]) -> None:
        """The pool knows: it was asked for them."""

    def read(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """See `TierBackend`; a use of the blocks."""
        try:
            hits = self.pool.get([key.hash for key in keys], token_ids_of(keys), [key.context for key in keys])
        except InvalidRequest:
            return 0  # tokens of blocks of another size
        try:
            count = len(hits.block_ids)
            copy_blocks(self.pool.regions(), hits.block_ids, region, block_ids[:count])
        finally:
            self.pool.free(hits)
        return count

    def write(self, keys: Sequence[BlockKey], region: KvRegion, block_ids: BlockIds) -> int:
        """See `TierBackend`."""
        position = {key.hash: n for n, key in enumerate(keys)}
        with self.filling(keys) as filling:
            wanted = block_ids[[position[key.hash] for key in filling.keys]]
            copy_blocks(region, wanted, filling.region, filling.block_ids)
            filling.num_filled = len(filling.keys)
        return sum(self.holds([key.hash for key in keys]))

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        self.pool.drop(hashes)

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        self.pool.watch(callback)

    def stats(self) -> KvTierStats:
        stats, outcomes = self.pool.get_utilization(), self.pool.outcomes
        size = self.block_bytes if stats.total_blocks else 0
        used = stats.total_blocks - stats.free_blocks
        return KvTierStats(
            name=self.name,
            dtype=self.pool.layout.dtype if stats.total_blocks else "",
            total_blocks=stats.total_blocks,
            used_blocks=used,
            used_bytes=used * size,
            hit_blocks=outcomes["hit"],
            stored_blocks=outcomes["stored"],
            evicted_blocks=outcomes["evicted"],
            bytes_read=outcomes["hit"] * size,
            bytes_written=outcomes["stored"] * size,
        )

    def close(self) -> None:
        """The pool is its owner's to give up."""


def token_ids_of(keys: Sequence[BlockKey]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.frombuffer(b"".join(key.token_bytes for key in keys), dtype="<i4")


def copy_blocks(source: KvRegion, from_ids: BlockIds, target: KvRegion, to_ids: BlockIds) -> None:
    """Block to_ids[i] becomes block from_ids[i]. Lets go of the GIL. Raises IndexError outside the regions."""
    if not len(to_ids):
        return
    size = source.block_bytes
    read = np.frombuffer(source.view, np.uint8).reshape(-1, size)
    write = np.frombuffer(target.view, np.uint8).reshape(-1, size)
    if min(from_ids.min(), to_ids.min()) < 0 or from_ids.max() >= len(read) or to_ids.max() >= len(write):
        raise IndexError(f"blocks are outside regions of {len(read)} and {len(write)} blocks")
    # By runs of the target: within one, a gather needs no loop.
    cuts = np.flatnonzero(np.diff(to_ids) != 1) + 1
    for start, stop in pairwise([0, *cuts.tolist(), len(to_ids)]):
        first = int(to_ids[start])
        np.take(read, from_ids[start:stop], axis=0, out=write[first : first + stop - start], mode="clip")
