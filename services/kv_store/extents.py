"""Which extents a store has blocks of, for it to give them on to other stores when one joins or leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from sagellm_common.core.types import BlockHash
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent

Held = Callable[[Sequence[BlockHash]], int]
"""How many leading blocks of these are stored."""

SPARE_ENTRIES = 256


class ExtentTable:
    """Learns from puts and gets, which name their extents; what the pool has evicted it finds out when it looks.

    A store that was restarted with its contents learns anew: what is asked for is given on, the rest can wait.
    """

    def __init__(self, held: Held) -> None:
        self._held = held
        self._blocks: dict[BlockHash, dict[int, BlockHash]] = {}
        """Extent key → number within the extent → block hash."""
        self._prune_above = SPARE_ENTRIES

    def __len__(self) -> int:
        return len(self._blocks)

    def learn(self, hashes: Sequence[BlockHash], extents: Sequence[Extent]) -> None:
        """`hashes` are the blocks of `extents`, in order, as far as they are stored."""
        at = 0
        for extent in extents:
            blocks = hashes[at : at + extent.num_blocks]
            if blocks:
                self._blocks.setdefault(extent.key, {}).update(enumerate(blocks, start=extent.offset))
            at += extent.num_blocks
        if len(self._blocks) > self._prune_above:
            self._prune_above = 2 * len(self.stored()) + SPARE_ENTRIES

    def stored(self) -> dict[BlockHash, list[BlockHash]]:
        """Key → leading blocks of each extent of which some are still stored. Forgets the others."""
        found = {}
        for key, blocks in list(self._blocks.items()):
            known = [blocks[n] for n in itertools.takewhile(blocks.__contains__, range(EXTENT_BLOCKS))]
            if count := self._held(known):
                found[key] = known[:count]
            else:
                del self._blocks[key]
        return found
