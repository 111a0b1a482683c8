"""Free space in one piece: which blocks to move for it, under a budget.

    before   ▓▓░▓░░▓▓░░░▓█░▓░     ▓ used   █ pinned   ░ free
    after    ▓▓▓▓▓▓▓▓░░░░█░░░     new tables lie in a row: fewer segments in a transfer, and the end can be given up

A paged pool loses no capacity by scattered free blocks; what it loses is that a table's blocks are neighbours, which
byte paths send as one piece (`KvRegion.runs`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.kv import BlockMoves, KvFragmentation

Mask = NDArray[np.bool_]


class Defragmentable(Protocol):
    """What `defragment` asks of a pool."""

    @property
    def block_bytes(self) -> int: ...

    def slot_map(self) -> tuple[Mask, Mask]:
        """(free, pinned), slot by slot."""

    def migrate(self, plan: BlockMoves) -> int: ...


def defragment(pool: Defragmentable, max_bytes: int) -> int:
    """Moves blocks of at most max_bytes towards a longer free run; returns how many. Sequences go on meanwhile."""
    free, pinned = pool.slot_map()
    plan = plan_compaction(free, pinned, max_bytes // max(1, pool.block_bytes))
    return pool.migrate(plan) if len(plan.sources) else 0


def plan_compaction(free: Mask, pinned: Mask, max_moves: int) -> BlockMoves:
    """The moves, max_moves at most, that leave the longest free run: the longest stretch of slots which has so few used
    blocks, none of them pinned, and for which there are as many free slots elsewhere, is evacuated into the smallest
    holes. Empty where that lengthens the longest run by less than it moves. O(slots), times log(max_moves).
    """
    size = len(free)
    if size == 0:
        return BlockMoves.none()
    used_before = np.concatenate([[0], np.cumsum(~free)])
    # For each begin: the first pinned slot from there on, and where the budget of used blocks ends.
    fences = np.append(np.flatnonzero(pinned), size)
    fence = fences[np.searchsorted(fences, np.arange(size))]
    begins = np.arange(size)
    best_begin = best_end = 0
    num_free = int(free.sum())
    longest = _longest_run(free)
    for moves in sorted({max_moves, *(max_moves >> shift for shift in range(1, max_moves.bit_length()))}, reverse=True):
        ends = np.minimum(fence, np.searchsorted(used_before, used_before[:-1] + moves, side="right") - 1)
        used = used_before[ends] - used_before[begins]
        # Free slots outside must take what is moved: of the whole pool's, the stretch itself has length - used.
        fits = num_free - (ends - begins - used) >= used
        lengths = np.where(fits, ends - begins, 0)
        begin = int(lengths.argmax())
        if lengths[begin] > best_end - best_begin:
            best_begin, best_end = begin, int(ends[begin])
    cost = int(used_before[best_end] - used_before[best_begin])
    if cost == 0 or best_end - best_begin - longest < cost:
        return BlockMoves.none()
    inside = np.zeros(size, np.bool_)
    inside[best_begin:best_end] = True
    sources = np.flatnonzero(inside & ~free)
    holes = np.flatnonzero(free & ~inside)
    order = np.lexsort((holes, _run_lengths(free & ~inside)[holes]))
    return BlockMoves(sources.astype(np.int32), np.sort(holes[order[: len(sources)]]).astype(np.int32))


def fragmentation(free: Mask, held_slots: int, wasted_slots: int) -> KvFragmentation:
    """`wasted_slots` of the `held_slots` token slots in held blocks are for no token; see `KvFragmentation`."""
    num_free, longest = int(free.sum()), _longest_run(free)
    return KvFragmentation(
        internal=wasted_slots / held_slots if held_slots else 0.0,
        external=1 - longest / num_free if num_free else 0.0,
        free_blocks=num_free,
        longest_free_run_blocks=longest,
    )


def _run_lengths(mask: Mask) -> NDArray[np.int64]:
    """For each set place the length of its run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    lengths = np.zeros(len(mask), np.int64)
    for begin, end in edges.reshape(-1, 2):
        lengths[begin:end] = end - begin
    return lengths


def _longest_run(mask: Mask) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).reshape(-1, 2)
    return int((edges[:, 1] - edges[:, 0]).max(initial=0))
