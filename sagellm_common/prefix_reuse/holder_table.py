"""What the index is made of: block hash → holders. Two implementations with the same results, compiled and Python.

Hashes are packed: 16 bytes each, one after the other, those of a prefix in token order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import Tier
from sagellm_common.core.types import BLOCK_HASH_BYTES, BlockHash
from sagellm_common.prefix_reuse.metrics import PrefixReuseMetrics

TIERS = len(Tier)
MAX_WORKERS = (1 << 16) // TIERS
MAX_BLOCKS = 1 << 31

_NOBODY: frozenset[int] = frozenset()

Depths = tuple[int, ...]
"""By tier: how many leading blocks are found in it or in faster ones. It never falls from one tier to the next."""


class HolderTable(Protocol):
    """At most `max_blocks` blocks: beyond that the least recently used are forgotten, of one prefix its end first.

    Any thread may call it, and waits for the others for a few thousand blocks at most.
    """

    def open(self) -> int:
        """A slot for a worker that holds nothing yet. Raises ConfigError beyond MAX_WORKERS."""

    def close(self, slot: int) -> int:
        """Forgets what the slot's worker holds; returns how many blocks, one in two tiers twice. Idempotent."""

    def insert(self, slot: int, tier: Tier, hashes: bytes) -> None:
        """It holds these blocks from now on. Of a slot that was closed: nothing happens."""

    def remove(self, slot: int, tier: Tier, hashes: bytes) -> None:
        """It no longer holds these blocks. Unknown ones are fine."""

    def match(self, hashes: bytes) -> dict[int, Depths]:
        """By slot, how deep each worker's blocks reach; who does not hold the first block is absent.

        The blocks found become the most recently used.
        """

    def held(self, slot: int, tier: Tier) -> int:
        """Blocks it holds there."""

    def metrics(self) -> PrefixReuseMetrics: ...


class NativeTable:
    """See `native/prefix_index.cpp`."""

    def __init__(self, library: Any, max_blocks: int) -> None:
        self._library = library
        self._index = library.sage_index_new(max_blocks)
        if not self._index:
            raise MemoryError("no memory for an empty prefix index")
        self._slots: set[int] = set()
        """All there ever were, 0 to n - 1: whoever holds a block is in it."""

    def __del__(self) -> None:
        if getattr(self, "_index", None):
            self._library.sage_index_free(self._index)

    def open(self) -> int:
        slot = int(self._library.sage_index_open(self._index))
        if slot < 0:
            raise _too_many()
        self._slots.add(slot)
        return slot

    def close(self, slot: int) -> int:
        return self._checked(self._library.sage_index_close(self._index, slot))

    def insert(self, slot: int, tier: Tier, hashes: bytes) -> None:
        count = _count(hashes)
        self._checked(self._library.sage_index_insert(self._index, TIERS * slot + tier, hashes, count))

    def remove(self, slot: int, tier: Tier, hashes: bytes) -> None:
        count = _count(hashes)
        self._checked(self._library.sage_index_remove(self._index, TIERS * slot + tier, hashes, count))

    def match(self, hashes: bytes) -> dict[int, Depths]:
        count, found, room = _count(hashes), 1, 0
        while found > room:  # again where a worker came between the two lines
            room = len(self._slots)
            slots, depths = np.empty(room, np.uint32), np.empty((room, TIERS), np.int32)
            where = slots.ctypes.data, depths.ctypes.data, room
            found = self._checked(self._library.sage_index_match(self._index, hashes, count, *where))
            if not found:
                return {}
        return dict(zip(slots[:found].tolist(), map(tuple, depths[:found].tolist()), strict=True))

    def held(self, slot: int, tier: Tier) -> int:
        return int(self._library.sage_index_held(self._index, TIERS * slot + tier))

    def metrics(self) -> PrefixReuseMetrics:
        values = np.empty(7, np.uint64)
        self._library.sage_index_metrics(self._index, values.ctypes.data)
        return PrefixReuseMetrics(*values.tolist())

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise MemoryError("the prefix index ran out of memory; lower index.max_blocks")
        return int(result)


class PythonTable:
    """The same in dicts: several times the memory and the time. `guard` is a lock where threads share it."""

    LOCKED_BLOCKS = 4096
    BLOCK_BYTES = 320
    """As `sagellm bench index` finds: a hash, its place in the ordered dict and in its holder's set (CPython 3.11)."""

    def __init__(self, max_blocks: int, guard: AbstractContextManager[Any]) -> None:
        self._max_blocks = max_blocks
        self._guard = guard
        self._holders: OrderedDict[BlockHash, frozenset[int]] = OrderedDict()
        """Least recently used first."""
        self._held: dict[int, set[BlockHash]] = {}
        self._open: set[int] = set()
        self._free: list[int] = []
        self._lookups = self._queried = self._matched = self._forgotten = 0

    def open(self) -> int:
        with self._guard:
            if not self._free and len(self._open) == MAX_WORKERS:
                raise _too_many()
            slot = self._free.pop() if self._free else len(self._open)
            self._open.add(slot)
            self._held.update((holder, set()) for holder in _holders(slot))
            return slot

    def close(self, slot: int) -> int:
        with self._guard:
            if slot not in self._open:
                return 0
            blocks = 0
            for holder in _holders(slot):
                blocks += len(self._held[holder])
                for block in list(self._held[holder]):
                    self._remove(holder, block)
                del self._held[holder]
            self._open.discard(slot)
            self._free.append(slot)
            return blocks

    def insert(self, slot: int, tier: Tier, hashes: bytes) -> None:
        holder = TIERS * slot + tier
        before = after = _NOBODY
        for turn in _in_turns(hashes, self.LOCKED_BLOCKS):
            with self._guard:
                if slot not in self._open:
                    return
                for block in turn:
                    holders = self._holders.get(block, _NOBODY)
                    if holders is not before or not after:  # along a prefix the sets are mostly one and the same
                        before, after = holders, holders | {holder}
                    self._holders[block] = after
                    self._holders.move_to_end(block)
                    self._held[holder].add(block)
                    while len(self._holders) > self._max_blocks:
                        self._forget_oldest()

    def remove(self, slot: int, tier: Tier, hashes: bytes) -> None:
        holder = TIERS * slot + tier
        for turn in _in_turns(hashes, self.LOCKED_BLOCKS):
            with self._guard:
                if slot not in self._open:
                    return
                for block in turn:
                    if block in self._held[holder]:
                        self._remove(holder, block)

    def match(self, hashes: bytes) -> dict[int, Depths]:
        count = _count(hashes)
        with self._guard:
            depths: dict[int, list[int]] = {}
            alive: dict[int, int] = {}  # slot → the slowest tier it has needed so far
            path: list[BlockHash] = []
            last: frozenset[int] | None = None
            for depth, block in enumerate(_blocks(hashes)):
                holders = self._holders.get(block)
                if depth == 0 and holders:
                    alive = dict.fromkeys(sorted({holder // TIERS for holder in holders}), 0)
                    depths = {slot: [0] * TIERS for slot in alive}
                if holders is not last and holders != last:
                    _narrow(alive, depths, holders or _NOBODY, depth)
                    last = holders
                if not alive:
                    break
                path.append(block)
            _narrow(alive, depths, _NOBODY, count)
            for block in reversed(path):
                self._holders.move_to_end(block)
            self._lookups += 1
            self._queried += count
            self._matched += len(path)
            return {slot: tuple(of_tier) for slot, of_tier in depths.items()}

    def held(self, slot: int, tier: Tier) -> int:
        with self._guard:
            return len(self._held.get(TIERS * slot + tier, ()))

    def metrics(self) -> PrefixReuseMetrics:
        with self._guard:
            blocks = len(self._holders)
            sets = len({id(holders) for holders in self._holders.values()})
            memory_bytes = self.BLOCK_BYTES * blocks
            lookups = self._lookups, self._queried, self._matched
            return PrefixReuseMetrics(blocks, memory_bytes, sets, *lookups, self._forgotten)

    def _remove(self, holder: int, block: BlockHash) -> None:
        self._held[holder].discard(block)
        left = self._holders[block] - {holder}
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def _forget_oldest(self) -> None:
        block, holders = self._holders.popitem(last=False)
        for holder in holders:
            self._held[holder].discard(block)
        self._forgotten += 1


def _narrow(alive: dict[int, int], depths: dict[int, list[int]], holders: frozenset[int], depth: int) -> None:
    """Takes out who does not hold block `depth`, and notes where each needed a slower tier for the first time."""
    for slot, slowest in list(alive.items()):
        tier = next((tier for tier in range(TIERS) if TIERS * slot + tier in holders), TIERS)
        depths[slot][slowest:tier] = [depth] * max(0, tier - slowest)
        if tier == TIERS:
            del alive[slot]
        else:
            alive[slot] = max(slowest, tier)


def _holders(slot: int) -> range:
    return range(TIERS * slot, TIERS * (slot + 1))


def _count(hashes: bytes) -> int:
    count, rest = divmod(len(hashes), BLOCK_HASH_BYTES)
    if rest:
        raise ValueError(f"hashes has {len(hashes)} bytes, which is no whole number of {BLOCK_HASH_BYTES}-byte hashes")
    return count


def _blocks(hashes: bytes) -> Iterator[BlockHash]:
    _count(hashes)
    return (hashes[at : at + BLOCK_HASH_BYTES] for at in range(0, len(hashes), BLOCK_HASH_BYTES))


def _in_turns(hashes: bytes, blocks: int) -> Iterator[Iterator[BlockHash]]:
    """From the last to the first, so that of one prefix the first is the most recently used."""
    for end in range(_count(hashes), 0, -blocks):
        begin = max(0, end - blocks)
        yield (hashes[BLOCK_HASH_BYTES * n : BLOCK_HASH_BYTES * (n + 1)] for n in range(end - 1, begin - 1, -1))


def _too_many() -> ConfigError:
    return ConfigError(f"the prefix index has {MAX_WORKERS} workers, and takes no more; start another router")
