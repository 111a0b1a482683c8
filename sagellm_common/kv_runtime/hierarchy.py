"""Memory and the tiers below it as one place where KV blocks are.

    put ──► pool ──copied ahead of its eviction──► tier 1 ──► tier 2 …
             ▲                                       │
    get ◄────┴───────────── promoted ◄───────────────┘

A block goes down before it must, in the background, so that evicting it frees memory at once: nobody who wants memory,
or a token, ever waits for a disk. What is evicted before its turn came is lost, and counted (`dropped_blocks`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal

from sagellm_common.core.kv import Allocation, BlockEvent, BlockInfo, BlockMoves, KvFragmentation, KvRegion, Tier
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvStats, KvTierStats, TokenIds
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.kv_policy.eviction import Cost
from sagellm_common.kv_policy.migration import MIGRATION, BlockFacts, MigrationPolicy, Move
from sagellm_common.kv_runtime.backends.host import HostKvPool, PendingPut
from sagellm_common.kv_runtime.backends.host_tier import HostTier
from sagellm_common.kv_runtime.migrator import KVMigrator, MigrationPlan
from sagellm_common.kv_runtime.tiers import BlockKey, TierBackend, keys_of

log = logging.getLogger(__name__)

WriteMode = Literal["through", "back"]
BACKLOG_SHARE = 0.5
"""Of a tier that may wait to be copied down with write mode `back`."""
POOL = 0
CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Block:
    tiers: int = 0
    """Bit n: it is in tier n."""
    uses: int = 1
    note: bytes = b""
    """Set while what the pool has of it came from a tier that is not exact."""
    depth: int = 0
    used_at: int = 0
    """In block accesses."""


class HierarchyManager:
    """`pool` and what `open_tiers` makes below it once a layout is settled. Thread-safe.

    `policy` says what goes down and what comes up; unset, everything does. Blocks are copied down as they come
    (`through`), or when BACKLOG_SHARE of the pool waits for it (`back`): less is written, and less survives a crash.
    """

    def __init__(
        self,
        pool: HostKvPool,
        open_tiers: Callable[[KvLayout], Sequence[TierBackend]] = lambda layout: (),
        *,
        policy: str | Callable[[int], MigrationPolicy] = "all",
        write: WriteMode = "through",
        threads: int = 4,
    ) -> None:
        """`policy` is made for a number of tiers, or one of MIGRATION. Raises ConfigError listing these."""
        self.pool = pool
        self._open_tiers = open_tiers
        self._make_policy = MIGRATION.get(policy) if isinstance(policy, str) else policy
        self._migration = policy if isinstance(policy, str) else policy.__name__
        self._policy = self._make_policy(1)
        self._write_mode = write
        self._num_threads = threads
        self._tiers: list[TierBackend] = [HostTier(pool)]
        self._migrator: KVMigrator | None = None
        self._opening = threading.Lock()
        self._watchers: list[Callable[[BlockEvent], None]] = []
        # The last lock to be taken: pool and tiers call back with theirs held.
        self._lock = threading.Lock()
        self._blocks: dict[BlockHash, _Block] = {}
        self._waiting: dict[tuple[int, int], OrderedDict[BlockHash, None]] = {}
        """By source and target: blocks to be copied down, the longest there first."""
        self._work = threading.Condition(self._lock)
        self._copying = False
        self._flushing = False
        self._closed = False
        self._dropped: Counter[int] = Counter()
        self._promoted: Counter[int] = Counter()
        self._inexact_hits = 0
        self._now = 0
        """In block accesses."""
        self._recompute_cost: RecomputeCost | None = None
        self._writer: threading.Thread | None = None
        pool.watch(partial(self._changed, POOL))

    # ---- what there is ----

    @property
    def layout(self) -> KvLayout:
        """Raises LayoutMismatch before the first one is known."""
        return self.pool.layout

    def regions(self) -> KvRegion:
        return self.pool.regions()

    def get_utilization(self) -> KvStats:
        """Of the pool: blocks below take none of its memory. With tiers where there are some."""
        stats = self.pool.get_utilization()
        return replace(stats, tiers=tuple(self.stats())) if len(self._tiers) > 1 else stats

    @property
    def settled(self) -> bool:
        """Whether there is a layout, and the tiers are open."""
        return self._migrator is not None

    def check_layout(self, layout: KvLayout) -> bool:
        """See `HostKvPool.check_layout`."""
        return self.pool.check_layout(layout)

    def adopt(self, layout: KvLayout) -> None:
        """Settles the layout, and opens the tiers for it, or checks it. May wait for a disk.

        Raises LayoutMismatch, and ConfigError when not one block fits a budget.
        """
        with self._opening:
            self.pool.adopt(layout)
            if self._migrator is None:
                self._open(layout)

    def locate(self, hashes: Sequence[BlockHash]) -> list[str]:
        """The fastest tier that has each block; empty for none."""
        with self._lock:
            found = [self._fastest(block_hash) for block_hash in hashes]
        return ["" if tier is None else self._tiers[tier].name for tier in found]

    def lookup(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes are in some tier."""
        with self._lock:
            return next((n for n, block_hash in enumerate(hashes) if block_hash not in self._blocks), len(hashes))

    def cached_hashes(self) -> list[BlockHash]:
        with self._lock:
            return list(self._blocks)

    def cached_by_tier(self) -> dict[Tier, list[BlockHash]]:
        """See `TieredCache`."""
        return {tier.kind: tier.hashes() for tier in self._tiers}

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Calls back on each change of each tier, in order. It must not call back into the hierarchy."""
        with self._lock:
            self._watchers.append(callback)

    def stats(self) -> list[KvTierStats]:
        """The fastest first; hits are told where the block was when it was asked for."""
        tiers = [tier.stats() for tier in self._tiers]
        exact = [tier.exact for tier in self._tiers]
        with self._lock:
            hits = [self._promoted[n] for n in range(len(tiers))]
            inexact = [0 if exact[n] else hits[n] for n in range(len(tiers))]
            # What was brought up is hit in the pool then.
            hits[POOL] = max(0, tiers[POOL].hit_blocks - sum(hits))
            inexact[POOL] = max(0, self._inexact_hits - sum(inexact))
            return [
                replace(stats, hit_blocks=hits[n], inexact_hit_blocks=inexact[n], dropped_blocks=self._dropped[n])
                for n, stats in enumerate(tiers)
            ]

    # ---- put and get ----

    def begin_put(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        tenant: str = "",
        contexts: Sequence[bytes] = (),
        depths: Sequence[int] = (),
    ) -> PendingPut:
        """See `HostKvPool.begin_put`."""
        return self.pool.begin_put(hashes, token_ids, tenant, contexts, depths)

    def commit_put(self, put: PendingPut) -> None:
        self.pool.commit_put(put)

    def abort_put(self, put: PendingPut) -> None:
        self.pool.abort_put(put)

    def below(self, hashes: Sequence[BlockHash]) -> bool:
        """Whether of the leading hashes some are in lower tiers only."""
        with self._lock:
            for block_hash in hashes:
                tier = self._fastest(block_hash)
                if tier is None:
                    return False
                if tier != POOL:
                    return True
            return False

    def get(self, hashes: Sequence[BlockHash], token_ids: TokenIds, contexts: Sequence[bytes] = ()) -> Allocation:
        """See `HostKvPool.get`: what is in the pool. `promote` comes before it where some is `below`."""
        got = self.pool.get(hashes, token_ids, contexts)
        self._use(hashes)
        with self._lock:
            self._inexact_hits += len(self._notes(hashes[: len(got.block_ids)]))
        return got

    def notes(self, hashes: Sequence[BlockHash]) -> list[bytes]:
        """Of those of the blocks in the pool that came from a tier which is not exact."""
        with self._lock:
            return self._notes(hashes)

    def pin(self, hashes: Sequence[BlockHash], ttl_s: float, most_blocks: int | None = None) -> int:
        """See `HostKvPool.pin`."""
        return self.pool.pin(hashes, ttl_s, most_blocks)

    def promote(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        timeout_s: float,
        contexts: Sequence[bytes] = (),
        depths: Sequence[int] = (),
    ) -> int:
        """Copies leading blocks into the pool, as many as it has room for; waits for them, at most timeout_s.

        Returns how many have come. Those of other `contexts`, where they are known, stay where they are.

        Raises InvalidRequest when the tokens do not match the number of hashes.
        """
        deadline_s = time.monotonic() + timeout_s
        keys = keys_of(hashes, token_ids, self.layout.block_size_tokens, known=contexts, depths=depths)
        with self._lock:
            for key in keys if depths else ():
                if key.hash in self._blocks:  # from an earlier life's disk, which did not keep it
                    self._blocks[key.hash].depth = key.depth
            where = [self._comes_up(block_hash) for block_hash in hashes]
        where = where[: where.index(None)] if None in where else where
        _, held = self.pool.hold(hashes[n] for n, tier in enumerate(where) if tier == POOL)
        try:
            stats = self.pool.get_utilization()
            room = stats.free_blocks + stats.cached_blocks
            running, at = [], 0
            for tier, run in groupby(where):
                count = len(list(run))
                if tier != POOL:
                    assert tier is not None and self._migrator is not None
                    plan = MigrationPlan(tier, POOL, tuple(keys[at : at + min(count, room)]))
                    self._take_notes(tier, plan)
                    running.append(self._migrator.migrate(plan))
                    room -= len(plan.keys)
                at += count
            for migration in running:
                if not migration.wait(max(0.0, deadline_s - time.monotonic())):
                    migration.cancel()
                with self._lock:
                    self._promoted[migration.plan.source] += migration.blocks_present
                    self._forget_notes(migration.plan)
            return sum(migration.blocks_present for migration in running)
        finally:
            self.pool.free(held)

    # ---- the rest of KVBackendProtocol: the pool's, with what it holds itself ----

    def allocate(self, token_ids: TokenIds, num_tokens: int, cache_salt: str = "", tenant: str = "") -> Allocation:
        return self.pool.allocate(token_ids, num_tokens, cache_salt, tenant)

    def bring_back(self, allocation: Allocation, token_ids: TokenIds, cache_salt: str = "") -> int:
        return self.pool.bring_back(allocation, token_ids, cache_salt)

    def lend(self, token_ids: TokenIds, cache_salt: str = "") -> Allocation:
        return self.pool.lend(token_ids, cache_salt)

    def share(self, allocation: Allocation) -> Allocation:
        return self.pool.share(allocation)

    def free(self, allocation: Allocation) -> None:
        self.pool.free(allocation)

    def extend(self, allocation: Allocation, num_tokens: int) -> None:
        self.pool.extend(allocation, num_tokens)

    def make_writable(self, allocation: Allocation, begin_token: int) -> int:
        return self.pool.make_writable(allocation, begin_token)

    def get_block_info(self, block_ids: BlockIds) -> list[BlockInfo]:
        return self.pool.get_block_info(block_ids)

    def migrate(self, plan: BlockMoves) -> int:
        return self.pool.migrate(plan)

    def get_fragmentation(self) -> KvFragmentation:
        return self.pool.get_fragmentation()

    @property
    def eviction(self) -> str:
        return self.pool.eviction

    def price(self, cost: Cost) -> None:
        self.pool.price(cost)

    def recomputes_at(self, cost: RecomputeCost) -> None:
        """What computing blocks again takes those who ask for them: eviction and migration policies go by the last
        word."""
        self._recompute_cost = cost
        self.price(cost.per_block(self.layout.block_size_tokens))

    @property
    def migration(self) -> str:
        """Name of the policy that says which blocks go down and come up; empty where there is nothing below."""
        return self._migration if len(self._tiers) > 1 else ""

    def set_migration(self, name: str) -> None:
        """Another policy from now on. What is where stays; what the old one has learned is lost.

        Raises ConfigError listing the known names, having changed nothing.
        """
        make = MIGRATION.get(name)
        with self._lock:
            self._make_policy, self._migration = make, name
            self._policy = make(len(self._tiers))

    def set_eviction(self, name: str) -> None:
        self.pool.set_eviction(name)

    # ---- life ----

    def flush(self, timeout_s: float) -> bool:
        """Until nothing waits to be copied down; False: not within timeout_s."""
        with self._work:
            self._flushing = True
            self._work.notify_all()
            try:
                return self._work.wait_for(lambda: not self._copying and not any(self._waiting.values()), timeout_s)
            finally:
                self._flushing = False

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Copies down what waits, as far as timeout_s goes, and closes the tiers. Idempotent."""
        if not self.flush(0.0 if self._closed else timeout_s):
            log.warning("%d blocks were not copied to a lower tier", sum(map(len, self._waiting.values())))
        with self._work:
            self._closed = True
            self._work.notify_all()
        if self._writer is not None:
            self._writer.join()
        if self._migrator is not None:
            self._migrator.close()
        for tier in self._tiers:
            tier.close()

    def _open(self, layout: KvLayout) -> None:
        below = list(self._open_tiers(layout))
        self._policy = self._make_policy(1 + len(below))
        self._tiers += below
        self._migrator = KVMigrator(self._tiers, threads=self._num_threads, on_copied=self._copied)
        for n, tier in enumerate(self._tiers[1:], start=1):
            tier.watch(partial(self._changed, n))
            self._changed(n, BlockEvent(stored=tuple(tier.hashes())))
        if below:
            self._writer = threading.Thread(target=self._copy_down, name="kv-write-ahead", daemon=True)
            self._writer.start()

    def _copied(self, source: int, target: int, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._policy.copied(source, target, num_bytes, seconds)

    def _copy_down(self) -> None:
        assert self._migrator is not None
        while (batch := self._next_batch()) is not None:
            (source, target), hashes = batch
            keys: list[BlockKey] = self._tiers[source].keys(hashes)
            migration = self._migrator.migrate(MigrationPlan(source, target, tuple(keys)))
            migration.wait()
            with self._work:
                self._dropped[target] += len(hashes) - migration.blocks_present
                self._copying = False
                self._work.notify_all()

    def _next_batch(self) -> tuple[tuple[int, int], list[BlockHash]] | None:
        """Blocks to be copied down now; waits for some. None: the hierarchy is closed."""
        assert self._migrator is not None
        with self._work:
            while not self._closed:
                for way, waiting in self._waiting.items():
                    if len(waiting) > self._backlog(way[0]):
                        count = min(len(waiting), self._num_threads * self._migrator.chunk_blocks)
                        self._copying = True
                        return way, [waiting.popitem(last=False)[0] for _ in range(count)]
                self._work.wait()
        return None

    def _use(self, hashes: Sequence[BlockHash]) -> None:
        with self._lock:
            used = []
            for block_hash in hashes:
                block = self._blocks.get(block_hash)
                if block is None:
                    break
                block.uses += 1
                self._accessed(block)
                used.append(block_hash)
                for n in range(len(self._tiers)):
                    if block.tiers >> n & 1:
                        self._consider(block_hash, n)
        for tier in self._tiers[1:]:
            tier.used(used)

    def _take_notes(self, tier: int, plan: MigrationPlan) -> None:
        """Before the blocks come up, so that nobody takes them for exact."""
        if self._tiers[tier].exact:
            return
        noted = self._tiers[tier].keys([key.hash for key in plan.keys])
        with self._lock:
            for key in noted:
                if key.hash in self._blocks:
                    self._blocks[key.hash].note = key.note

    # ---- the lock is held from here on ----

    def _forget_notes(self, plan: MigrationPlan) -> None:
        """Of blocks that have not come up."""
        for key in plan.keys:
            block = self._blocks.get(key.hash)
            if block is not None and not block.tiers & 1:
                block.note = b""

    def _notes(self, hashes: Sequence[BlockHash]) -> list[bytes]:
        found = (self._blocks.get(block_hash) for block_hash in hashes)
        return [block.note for block in found if block is not None and block.note]

    def _backlog(self, source: int) -> int:
        """Blocks that may wait to leave the tier."""
        if self._write_mode == "through" or self._flushing or source != POOL:
            return 0
        return int(self.pool.regions().num_blocks * BACKLOG_SHARE)

    def _fastest(self, block_hash: BlockHash) -> int | None:
        block = self._blocks.get(block_hash)
        return None if block is None else (block.tiers & -block.tiers).bit_length() - 1

    def _accessed(self, block: _Block) -> None:
        self._now += 1
        block.used_at = self._now
        self._policy.came(block.uses)

    def _facts(self, block_hash: BlockHash, tier: int, more: int = 0) -> BlockFacts:
        block, cost, size = self._blocks[block_hash], self._recompute_cost, self.layout.block_size_tokens
        begin = block.depth * size
        return BlockFacts(
            tier,
            block.uses + more,
            depth=block.depth,
            num_bytes=self._tiers[tier].block_bytes,
            idle=self._now - block.used_at,
            recompute_s=cost.seconds(begin, begin + size) if cost else None,
        )

    def _comes_up(self, block_hash: BlockHash) -> int | None:
        """The tier it is used from; None where it is not to be brought up, or nowhere."""
        tier = self._fastest(block_hash)
        if tier is None or tier == POOL:
            return tier
        return tier if self._policy.on_use(self._facts(block_hash, tier, 1)).move is Move.PROMOTE else None

    def _consider(self, block_hash: BlockHash, tier: int) -> None:
        """If it were evicted from `tier` now, where would it go? There it is copied."""
        if tier + 1 >= len(self._tiers):
            return
        decision = self._policy.on_evict(self._facts(block_hash, tier))
        target = decision.tier
        if decision.move is Move.DEMOTE and target is not None and not self._blocks[block_hash].tiers >> target & 1:
            self._waiting.setdefault((tier, target), OrderedDict())[block_hash] = None
            self._work.notify_all()

    def _changed(self, tier: int, event: BlockEvent) -> None:
        """A tier's change, told with its lock held."""
        bit = 1 << tier
        with self._lock:
            for n, block_hash in enumerate(event.stored):
                block = self._blocks.get(block_hash)
                if block is None:
                    block = self._blocks[block_hash] = _Block()
                    self._accessed(block)
                if event.depths:
                    block.depth = event.depths[n]
                block.tiers |= bit
                self._consider(block_hash, tier)
            for block_hash in event.removed:
                block = self._blocks[block_hash]
                block.tiers &= ~bit
                if tier == POOL:
                    block.note = b""
                if not block.tiers:
                    del self._blocks[block_hash]
                for (source, target), waiting in self._waiting.items():
                    if source == tier and block_hash in waiting:
                        del waiting[block_hash]
                        self._dropped[target] += 1
            named = replace(event, tier=self._tiers[tier].kind)
            for callback in self._watchers:
                callback(named)
