"""The changes of a prefix cache, numbered, for watchers that come, fall behind and come back."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sagellm_common.core.clock import Clock
from sagellm_common.core.kv import BlockEvent, Tier, TieredCache
from sagellm_common.core.types import BlockHash
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol

PART_BLOCKS = 1 << 13
"""Told in one message: 128 KiB. The next watcher, and everything else, has its turn between two."""


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """What a cache gained and lost in one tier; hashes are packed, those of one prefix in token order.

    With `snapshot`, `stored` is all it holds, with the parts that follow if `more`. `revision` is what is known after
    the last part, `since` what the changes build on. `age_s` is the age of the oldest of them, when they were told.
    """

    revision: int
    since: int = 0
    snapshot: bool = False
    more: bool = False
    tier: Tier = Tier.DEVICE
    stored: bytes = b""
    removed: bytes = b""
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Change:
    revision: int
    at_s: float
    stored: bool


class BlockJournal:
    """Remembers of each hash its last change, and forgets the oldest beyond `history_blocks`: whoever has seen less
    is told everything that there is. Watchers cost nothing while they are away.

    `home` is the tier of events that name none.
    """

    def __init__(self, pool: KVBackendProtocol, clock: Clock, history_blocks: int, home: Tier) -> None:
        self._pool = pool
        self._clock = clock
        self._history_blocks = history_blocks
        self._home = home
        self._lock = threading.Lock()
        self._revision = 1
        """0 is a watcher that knows nothing, not one that has seen the empty beginning."""
        self._compacted = 0
        """The newest change that was forgotten."""
        self._changes: dict[Tier, OrderedDict[BlockHash, _Change]] = {tier: OrderedDict() for tier in Tier}
        """Oldest first."""
        pool.watch(self._on_event)

    def _on_event(self, event: BlockEvent) -> None:
        """From any thread. Takes no other lock, for the pool may hold its own here."""
        with self._lock:
            self._revision += 1
            changes = self._changes[self._home if event.tier is None else event.tier]
            now = self._clock.now()
            for hashes, stored in ((event.removed, False), (event.stored, True)):
                change = _Change(self._revision, now, stored)
                for block in hashes:
                    changes[block] = change
                    changes.move_to_end(block)
            self._compact()

    def _compact(self) -> None:
        excess = sum(map(len, self._changes.values())) - self._history_blocks
        for _ in range(excess):
            oldest = min(
                (changes for changes in self._changes.values() if changes),
                key=lambda changes: next(iter(changes.values())).revision,
            )
            _, change = oldest.popitem(last=False)
            self._compacted = max(self._compacted, change.revision)

    def after(self, seen: int) -> Iterator[BlockChanges]:
        """The parts of what came after revision `seen`; none for nothing new. Everything where that is not known.

        Between two parts the caller may do other things: they were cut out of one moment.
        """
        with self._lock:
            revision = self._revision
            if seen == revision:
                return iter(())
            if self._compacted <= seen <= revision and seen:
                told = self._since(seen)
                return _numbered(told, revision, seen, snapshot=False)
        # The number before the hashes: a change in between is told again, and telling twice is harmless.
        if isinstance(self._pool, TieredCache):
            held: Mapping[Tier, list[BlockHash]] = self._pool.cached_by_tier()
        else:
            held = {self._home: self._pool.cached_hashes()}
        everything = [_Told(tier, hashes, stored=True, age_s=0.0) for tier, hashes in held.items()]
        return _numbered(everything, revision, 0, snapshot=True)

    def _since(self, seen: int) -> list[_Told]:
        """What was stored comes first: a block that moves is never nowhere."""
        now = self._clock.now()
        told: dict[bool, list[_Told]] = {True: [], False: []}
        for tier, changes in self._changes.items():
            for stored in (True, False):
                found, age_s = list[BlockHash](), 0.0
                for block, change in reversed(changes.items()):
                    if change.revision <= seen:
                        break
                    if change.stored is stored:
                        found.append(block)
                        age_s = now - change.at_s
                if found:
                    told[stored].append(_Told(tier, found[::-1], stored, age_s))
        return told[True] + told[False]


@dataclass(frozen=True, slots=True)
class _Told:
    tier: Tier
    hashes: list[BlockHash]
    stored: bool
    age_s: float


def _numbered(told: list[_Told], revision: int, since: int, *, snapshot: bool) -> Iterator[BlockChanges]:
    """At least one part, joined as they are asked for. Each list's end comes first: whoever has no room for all then
    forgets the ends of prefixes, not their beginnings."""
    parts = [(one, at) for one in told for at in reversed(range(0, len(one.hashes), PART_BLOCKS))]
    if not parts:
        yield BlockChanges(revision, since, snapshot)
    for n, (one, at) in enumerate(parts):
        packed = b"".join(one.hashes[at : at + PART_BLOCKS])
        yield BlockChanges(
            revision,
            since,
            snapshot=snapshot and n == 0,
            more=n + 1 < len(parts),
            tier=one.tier,
            stored=packed if one.stored else b"",
            removed=b"" if one.stored else packed,
            age_s=one.age_s,
        )
