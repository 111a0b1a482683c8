"""The blocks of a pool: who holds each, on whose account, and where in memory it lies.

    table of a sequence      [ 7, 2, 9 ]            blocks: what holders name; a block keeps its number while it is held
                               │  │  │
    slot_of                  [ 0, 1, 5 ]            slots: where the bytes are; what byte paths and kernels see

Each block, free ones too, has exactly one slot: moving a block to a free slot swaps the two, and no table changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.errors import KvExhausted
from sagellm_common.core.types import BlockIds

BlockArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class CopyOnWrite:
    """A table whose writer shares none of the blocks it is about to write.

    `copies[i]` is to get the bytes of `originals[i]` *before* anything is written. The originals are still held for
    the writer, so that they stay as they are: whoever has copied gives them to `release`.
    """

    table: BlockArray
    originals: BlockArray
    copies: BlockArray


class BlockManager:
    """References, accounts and slots of `num_blocks` blocks. Guarded by its pool's lock; a call costs O(its blocks).

    No block is named twice in one call: a table has each of its blocks once.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = np.zeros(num_blocks, np.int32)
        """Holders of each block. To be read only."""
        self.accounts = np.zeros(num_blocks, np.int16)
        """Whom a held block is charged to: whoever allocated it, also when others share it later. To be read only."""
        self._charged = np.zeros(1, np.int64)
        self._slot_of = np.arange(num_blocks, dtype=np.int64)
        self._block_at = np.arange(num_blocks, dtype=np.int64)
        # A stack of which the first _num_free are in it. What was freed last is allocated first, in the same order.
        self._free = np.arange(num_blocks, dtype=np.int64)[::-1].copy()
        self._num_free = num_blocks

    # ---- references ----

    @property
    def num_free(self) -> int:
        return self._num_free

    def free_blocks(self) -> BlockArray:
        return self._free[: self._num_free].copy()

    def allocate(self, count: int, account: int = 0) -> BlockArray:
        """Blocks with one reference each. Raises KvExhausted, having taken nothing."""
        if count > self._num_free:
            raise KvExhausted(f"{count} KV blocks wanted, {self._num_free} of {self.num_blocks} free")
        blocks = self._free[self._num_free - count : self._num_free][::-1].copy()
        self._num_free -= count
        self.ref_counts[blocks] = 1
        self.accounts[blocks] = account
        self._charge(account, count)
        return blocks

    def hold(self, blocks: BlockArray) -> None:
        """One reference more on each. Raises ValueError for one that nobody holds: it may become anybody's."""
        if (self.ref_counts[blocks] < 1).any():
            raise ValueError(f"blocks {blocks.tolist()} are to be shared, but nobody holds some of them")
        self.ref_counts[blocks] += 1

    def release(self, blocks: BlockArray) -> BlockArray:
        """One reference less on each; returns those that are free now. Raises ValueError where there is none to drop,
        having dropped none: a block that is freed once too often would end up in two tables."""
        if (self.ref_counts[blocks] < 1).any():
            raise ValueError(f"blocks {blocks.tolist()} are to be freed, but nobody holds some of them")
        self.ref_counts[blocks] -= 1
        freed = blocks[self.ref_counts[blocks] == 0]
        self._free[self._num_free : self._num_free + len(freed)] = freed[::-1]
        self._num_free += len(freed)
        if len(freed):
            counts = np.bincount(self.accounts[freed], minlength=len(self._charged))
            self._charged[: len(counts)] -= counts
        return cast(BlockArray, freed)

    def charged(self, account: int) -> int:
        """Blocks held on this account."""
        return int(self._charged[account]) if account < len(self._charged) else 0

    def copy_on_write(self, table: BlockArray, first: int, account: int = 0) -> CopyOnWrite:
        """For a holder of `table` who is to write its blocks from position `first` on: those that others hold, too,
        are replaced by blocks of its own. Raises KvExhausted, having taken nothing.
        """
        shared = first + np.flatnonzero(self.ref_counts[table[first:]] > 1)
        copies = self.allocate(len(shared), account)
        own = table.copy()
        own[shared] = copies
        return CopyOnWrite(own, table[shared], copies)

    # ---- places ----

    def slots(self, blocks: BlockArray) -> BlockArray:
        """Where in memory they are."""
        return self._slot_of[blocks]

    def blocks_at(self, slots: BlockArray | BlockIds) -> BlockArray:
        return self._block_at[slots]

    def move(self, sources: BlockArray | BlockIds, destinations: BlockArray | BlockIds) -> None:
        """The blocks in slots `sources` are in `destinations` from now on, where free ones were. Tables keep naming
        them as before. Raises ValueError for a destination in use, having moved nothing."""
        moved, free = self._block_at[sources], self._block_at[destinations]
        if self.ref_counts[free].any():
            raise ValueError(f"slots {destinations.tolist()} are to be written, but somebody holds some of them")
        self._block_at[destinations], self._block_at[sources] = moved, free
        self._slot_of[moved], self._slot_of[free] = destinations, sources

    def order_free(self) -> None:
        """Free blocks are allocated by rising slot: neighbours in a table are neighbours in memory. O(free blocks)."""
        free = self._free[: self._num_free]
        free[:] = free[np.argsort(self._slot_of[free])[::-1]]

    def problems(self) -> list[str]:
        """What is wrong with these books in themselves; empty: nothing."""
        found, free = [], self._free[: self._num_free]
        if len(np.unique(free)) != len(free):
            found.append("a block is free twice")
        if not np.array_equal(np.sort(free), np.flatnonzero(self.ref_counts == 0)):
            found.append("the free blocks are not those that nobody holds")
        if not np.array_equal(self._block_at[self._slot_of], np.arange(self.num_blocks)):
            found.append("two blocks share a slot of memory")
        counted = np.bincount(self.accounts[self.ref_counts > 0], minlength=len(self._charged))
        if not np.array_equal(counted, self._charged):
            found.append(f"accounts are charged {self._charged.tolist()} blocks, but hold {counted.tolist()}")
        return found

    def _charge(self, account: int, count: int) -> None:
        if account >= len(self._charged):
            self._charged = np.pad(self._charged, (0, account + 1 - len(self._charged)))
        self._charged[account] += count
