"""Where the bytes of blocks lie in blocks of another size or other ranks, of the same dtype: run by run.

So what arrives is written where it belongs, and not a second time. A block's runs are the same for all blocks that
begin at the same token of one of ours: they are worked out once, by array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sagellm_common.comm_backend.pieces import Offsets, Pieces
from sagellm_common.comm_backend.transcode import row_bytes
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds, KvLayout

STRIPE_BYTES = 64
"""Runs are multiples of it, or native code cannot digest several of them as one (`native/pieces.h`)."""


@lru_cache(maxsize=64)
def reshape_between(source: KvLayout, target: KvLayout) -> Reshape | None:
    """None: the bytes do not only change their places, or in runs that have to be staged."""
    if source.dtype != target.dtype:
        return None
    found = Reshape(source, target)
    return found if found.in_stripes else None


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Of some blocks in a row: size[i] bytes go to offset[i] of the target's block number block[i], counted from the
    one that the first of them begins in. parts[k] of the runs are block k's."""

    block: Offsets
    offset: Offsets
    size: Offsets
    parts: Offsets


class Reshape:
    """From blocks of `source` to those of `target`, which differ in nothing else than block size and ranks."""

    def __init__(self, source: KvLayout, target: KvLayout) -> None:
        self._source, self._target = source, target
        sizes = source.block_size_tokens, target.block_size_tokens
        self._period = math.lcm(*sizes) // sizes[0]
        """After so many blocks the runs are the same again, some blocks of ours further on."""
        self._known: dict[tuple[int, int], _Runs] = {}
        self._tiled: tuple[tuple[int, int], tuple[Offsets, Offsets]] | None = None

    @property
    def in_stripes(self) -> bool:
        """Whether all runs, and with them those of any block, are multiples of STRIPE_BYTES."""
        return all(not (self._runs(slot, 1).size % STRIPE_BYTES).any() for slot in self._slots())

    def _slots(self) -> range:
        """The slots of our blocks in which blocks of theirs can begin."""
        ours = self._target.block_size_tokens
        return range(0, ours, math.gcd(self._source.block_size_tokens, ours))

    def pieces(self, region: KvRegion, target_blocks: BlockIds, start: int, count: int) -> Pieces:
        """Where `count` whole blocks, the first of which begins at token `start`, lie in the target's, whose block
        table is given from its token 0 on."""
        ours, theirs = self._target.block_size_tokens, self._source.block_size_tokens
        begins = target_blocks.astype(np.int64) * self._target.block_bytes
        whole, rest = divmod(count, self._period)
        found = []
        if whole:
            runs = self._runs(start % ours, self._period)
            first = start // ours + np.arange(whole, dtype=np.int64) * (self._period * theirs // ours)
            found.append((_placed(begins, first, runs), *self._sizes(start % ours, whole)))
        if rest:
            at = start + whole * self._period * theirs
            runs = self._runs(at % ours, rest)
            found.append((_placed(begins, np.array([at // ours]), runs), runs.size, runs.parts))
        if len(found) == 1:
            offsets, sizes, parts = found[0]
        else:
            offsets, sizes, parts = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return Pieces(region.view, offsets, sizes, region, parts)

    def _sizes(self, slot: int, periods: int) -> tuple[Offsets, Offsets]:
        """`_Runs.size` and `parts` of so many periods. The last ones are kept: groups are of one size."""
        asked = slot, periods
        kept = self._tiled
        if kept is None or kept[0] != asked:
            runs = self._runs(slot, self._period)
            kept = self._tiled = asked, (np.tile(runs.size, periods), np.tile(runs.parts, periods))
        return kept[1]

    def _runs(self, slot: int, count: int) -> _Runs:
        """Of `count` blocks, the first of which begins in this slot of one of ours."""
        known = self._known.get((slot, count))
        if known is None:
            size, ours = self._source.block_size_tokens, self._target.block_size_tokens
            each = [self._of_block(slot + n * size) for n in range(count)]
            known = self._known[slot, count] = _Runs(
                np.concatenate([runs.block + (slot + n * size) // ours for n, runs in enumerate(each)]),
                np.concatenate([runs.offset for runs in each]),
                np.concatenate([runs.size for runs in each]),
                np.concatenate([runs.parts for runs in each]),
            )
        return known

    def _of_block(self, start: int) -> _Runs:
        """Of one block that begins at this token, in the order of its bytes; `block` from the one it begins in on."""
        source, target = self._source, self._target
        ours, groups = target.block_size_tokens, math.lcm(source.tp, target.tp)
        slots = start % ours + np.arange(source.block_size_tokens)
        # [rank of the source, layer, token, group of heads within the rank]
        group = np.arange(groups).reshape(source.tp, 1, 1, -1)
        rank, part = np.divmod(group, groups // target.tp)
        layer = np.arange(source.num_layers).reshape(1, -1, 1, 1)
        token = slots.reshape(1, 1, -1, 1)
        at = rank * (target.block_bytes // target.tp)
        block, offset, size = [], [], []
        for all_heads in row_bytes(source):
            row, of_group = all_heads // target.tp, all_heads // groups
            offsets = at + layer * (ours * row) + token % ours * row + part * of_group
            offset.append(offsets)
            block.append(np.broadcast_to(token // ours, offsets.shape))
            size.append(np.full(offsets.shape, of_group))
            at = at + target.num_layers * ours * row
        # A block is rank after rank, and each of these kind after kind.
        flat = [np.stack(kinds, axis=1).astype(np.int64).ravel() for kinds in (block, offset, size)]
        return _merged(*flat)


def _merged(block: Offsets, offset: Offsets, size: Offsets) -> _Runs:
    """Neighbours as one."""
    apart = (block[1:] != block[:-1]) | (offset[1:] != offset[:-1] + size[:-1])
    firsts = np.concatenate([[0], np.flatnonzero(apart) + 1])
    return _Runs(block[firsts], offset[firsts], np.add.reduceat(size, firsts), np.array([len(firsts)]))


def _placed(begins: Offsets, first: Offsets, runs: _Runs) -> Offsets:
    """Offsets of the runs in the pool, once for each of the target's blocks number `first`."""
    of_runs = begins[first[:, None] + runs.block] if runs.block.any() else begins[first][:, None]
    placed: Offsets = (of_runs + runs.offset).ravel()
    return placed
