"""Who has cached what, as far as the router was told: each worker's block events go into one prefix index.

A worker that was silent for too long, or whose watch broke, gets no credit; what is known of it stays, so that a watch
that comes back goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sagellm_common.core.clock import Clock
from sagellm_common.core.config import IndexConfig
from sagellm_common.core.types import BLOCK_HASH_BYTES
from sagellm_common.prefix_reuse.index import PrefixReuseIndex
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS
from sagellm_common.rpc.block_journal import BlockChanges
from sagellm_common.rpc.worker_client import IndexedBlocks

PIECE_BYTES = 2048 * BLOCK_HASH_BYTES
"""Applied at once, in half a millisecond; some more where it is the first to touch a page of the index. The listing of
a large cache holds nothing else up."""


class EventsMissed(Exception):
    """Changes do not build on what is known: the worker must be asked again."""


@dataclass(slots=True)
class _Known:
    """One incarnation of a worker."""

    worker_id: str
    watched: bool = False
    revision: int = 0
    """Up to which everything is known; 0: nothing is."""
    listing: tuple[int, int] | None = None
    """(since, revision) of changes of which more parts must come."""
    heard_s: float | None = None
    lag_s: float = 0.0

    def goes_on_with(self, changes: BlockChanges) -> bool:
        if self.listing:
            return self.listing == (changes.since, changes.revision)
        return 0 < self.revision == changes.since


class CachedBlocks:
    def __init__(self, config: IndexConfig, clock: Clock) -> None:
        self._index = PrefixReuseIndex(config.max_blocks, threading.Lock())
        self._max_staleness_s = config.max_staleness_s
        self._clock = clock
        self._known: dict[str, _Known] = {}
        """By worker id and incarnation, as one string: the name under which the index has it."""
        self._matched_tokens = 0

    @property
    def sign_of_life_s(self) -> float:
        """How often a worker must be heard of: in time for a second one to be missed."""
        return self._max_staleness_s / 3

    # ---- what workers tell ----

    def watched(self, worker_id: str, incarnation: str) -> int:
        """A watch begins. Returns the revision up to which the worker's events are known; 0: none."""
        known = self._known.setdefault(_name(worker_id, incarnation), _Known(worker_id))
        known.listing = None
        return known.revision

    async def apply(self, worker_id: str, incarnation: str, changes: BlockChanges) -> None:
        """Raises EventsMissed. Cancelled in the middle, the rest is told again to the next watch."""
        name = _name(worker_id, incarnation)
        known = self._known[name]
        if changes.snapshot:
            known.revision = 0
            self._index.invalidate(name)
        elif not known.goes_on_with(changes):
            raise EventsMissed
        if changes.stored or changes.removed:
            known.lag_s = changes.age_s
        # From the last to the first, so that of one prefix the end is forgotten first.
        for piece in _pieces(changes.stored):
            self._index.insert(name, piece, changes.tier)
            await asyncio.sleep(0)
            if self._known.get(name) is not known:
                return  # it left meanwhile
        for piece in _pieces(changes.removed):
            self._index.evict(name, piece, changes.tier)
            await asyncio.sleep(0)
            if self._known.get(name) is not known:
                return
        known.listing = (changes.since, changes.revision) if changes.more else None
        if not changes.more:
            known.revision = changes.revision
        known.watched, known.heard_s = True, self._clock.now()

    def unwatched(self, worker_id: str, incarnation: str) -> None:
        """The watch has ended, maybe to be taken up again."""
        if known := self._known.get(_name(worker_id, incarnation)):
            known.watched = False

    def forget(self, worker_id: str, incarnation: str) -> None:
        """The worker is gone. Idempotent."""
        name = _name(worker_id, incarnation)
        if self._known.pop(name, None):
            self._index.invalidate(name)

    # ---- what the router asks ----

    def matched(self, hashes: bytes, block_size_tokens: int) -> dict[str, int]:
        """Leading tokens of the packed `hashes`' blocks that each worker holds, by worker id; those without any are
        absent."""
        found = dict[str, int]()
        for name, depths in self._index.lookup(hashes).items():
            known = self._known[name]
            if self._credited(known):
                found[known.worker_id] = depths[-1] * block_size_tokens
        self._matched_tokens += max(found.values(), default=0)
        return found

    def sharded(self, hashes: bytes, block_size_tokens: int, worker_ids: Collection[str]) -> int:
        """Leading tokens that these workers hold between them, where each keeps other extents of a sequence."""
        num_blocks, step = 0, EXTENT_BLOCKS * BLOCK_HASH_BYTES
        for at in range(0, len(hashes), step):
            extent, most = hashes[at : at + step], 0
            for name, depths in self._index.lookup(extent).items():
                known = self._known[name]
                if known.worker_id in worker_ids and self._credited(known):
                    most = max(most, depths[-1])
            num_blocks += most
            if most * BLOCK_HASH_BYTES < len(extent):
                break
        return num_blocks * block_size_tokens

    def view(self, worker_id: str, incarnation: str) -> IndexedBlocks | None:
        """None for a worker that never told anything."""
        name = _name(worker_id, incarnation)
        known = self._known.get(name)
        if known is None or known.heard_s is None:
            return None
        return IndexedBlocks(
            revision=known.revision,
            blocks=sum(self._index.held(name).values()),
            staleness_ms=self._staleness_s(known) * 1e3,
            lag_ms=known.lag_s * 1e3,
            credited=self._credited(known),
        )

    def _credited(self, known: _Known) -> bool:
        return known.watched and self._staleness_s(known) <= self._max_staleness_s

    def _staleness_s(self, known: _Known) -> float:
        return math.inf if known.heard_s is None else self._clock.now() - known.heard_s

    # ---- Prometheus ----

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        index = self._index.metrics
        yield GaugeMetricFamily("sagellm_router_index_blocks", "Blocks the prefix index knows of.", index.blocks)
        yield GaugeMetricFamily("sagellm_router_index_bytes", "Memory of the prefix index.", index.memory_bytes)
        yield GaugeMetricFamily(
            "sagellm_router_index_block_bytes", "Memory per block of the prefix index.", index.bytes_per_block
        )
        counted = {
            "lookups": ("Prompts looked up, once per KV layout.", index.lookups),
            "queried_blocks": ("Blocks of the prompts looked up.", index.queried_blocks),
            "matched_blocks": ("Of them, those that the best worker holds.", index.matched_blocks),
            "matched_tokens": ("Tokens of the longest prefixes that a credited worker holds.", self._matched_tokens),
            "forgotten_blocks": ("Blocks forgotten for index.max_blocks.", index.forgotten_blocks),
        }
        for name, (what, value) in counted.items():
            yield CounterMetricFamily(f"sagellm_router_index_{name}", what, value)
        staleness = GaugeMetricFamily(
            "sagellm_router_index_staleness_seconds", "Since a worker's last word.", labels=["worker_id"]
        )
        lag = GaugeMetricFamily(
            "sagellm_router_index_lag_seconds",
            "How old the events of a worker's last changes were when it told them.",
            labels=["worker_id"],
        )
        for known in [*self._known.values()]:
            if known.heard_s is not None:
                staleness.add_metric([known.worker_id], self._staleness_s(known))
                lag.add_metric([known.worker_id], known.lag_s)
        yield staleness
        yield lag
        held = GaugeMetricFamily(
            "sagellm_router_index_worker_blocks", "Blocks known of each worker.", labels=["worker_id", "tier"]
        )
        for name, known in [*self._known.items()]:
            for tier, blocks in self._index.held(name).items():
                held.add_metric([known.worker_id, tier.name.lower()], blocks)
        yield held


def _name(worker_id: str, incarnation: str) -> str:
    return f"{worker_id}@{incarnation}"


def _pieces(hashes: bytes) -> Iterator[bytes]:
    """From the last to the first."""
    for end in range(len(hashes), 0, -PIECE_BYTES):
        yield hashes[max(0, end - PIECE_BYTES) : end]
