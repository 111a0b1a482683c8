"""A pool of KV blocks: *match what is cached → make room → take fresh blocks → hand out*, under one lock.

    KVPool ── BlockManager    references, accounts, slots
           ├─ PrefixCache     verified hits, watchers ── eviction policy
           ├─ QuotaManager    who may take how much
           └─ KvMemory        the bytes

The pools of the host, of LMDeploy and of tests are this one over different memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from sagellm_common.core.clock import Clock, SystemClock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import KvExhausted, LayoutMismatch, SageError
from sagellm_common.core.kv import (
    Allocation,
    BlockEvent,
    BlockInfo,
    BlockMoves,
    KvFragmentation,
    KvMemory,
    KvRegion,
    Tier,
)
from sagellm_common.core.types import (
    BlockHash,
    BlockIds,
    KvLayout,
    KvStats,
    KvTierStats,
    TenantUsage,
    TokenIds,
    pack_int32,
)
from sagellm_common.kv_policy.eviction import Cost, EvictionPolicy, make_eviction, swap_eviction, uniform
from sagellm_common.kv_policy.eviction.cost_aware import CostAware
from sagellm_common.kv_runtime import defrag
from sagellm_common.kv_runtime.block_manager import BlockArray, BlockManager
from sagellm_common.kv_runtime.prefix_cache import PrefixCache
from sagellm_common.kv_runtime.quota import QuotaManager
from sagellm_common.kv_runtime.tiers import BlockKey, keys_of
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.matcher import contexts


@dataclass(slots=True, eq=False)
class PoolAllocation(Allocation):
    """`block_ids` are slots, which others get to know, so they do not move; `table` are the blocks in them.

    `num_tokens` is what it was allocated for, `hashes` name its shared blocks. `live` until freed or handed over.
    `uses` False: its blocks are held to be copied, which is no use of them.
    """

    table: BlockArray = field(default_factory=lambda: np.empty(0, np.int64))
    num_tokens: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    account: int = 0
    uses: bool = True
    live: bool = True

    def was_filled(self, block_size_tokens: int) -> bool:
        """Whether its holder brought KV from elsewhere, beyond what the cache had."""
        return self.num_cached_tokens > self.num_shared_blocks * block_size_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Blocks that one holder holds for `num_tokens` tokens; a pinned one's stay where they are."""

    blocks: BlockArray
    num_tokens: int
    pinned: bool = True


class Below(Protocol):
    """Where a pool's evicted blocks go, and come back from: `host_cache.HostCache`."""

    def keep(self, keys: Sequence[BlockKey], memory: KvMemory, slots: BlockIds) -> None:
        """Copies of these blocks. The pool's lock is held."""

    def bring_back(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        contexts: Sequence[bytes],
        memory: KvMemory,
        slots: BlockIds,
    ) -> int:
        """Fills slots[i] with the block of hashes[i], leading ones only and `most_blocks` at most; returns how many."""

    @property
    def most_blocks(self) -> int: ...

    def hashes(self) -> list[BlockHash]:
        """Of the blocks that would come back."""

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Calls back on each change of them, in order; it must not call back."""

    @property
    def rejected(self) -> int:
        """Blocks that were found by name and were not those asked for."""

    def stats(self) -> KvTierStats: ...


class KVPool:
    """A `KVBackendProtocol` over any memory, once that is given to `open`. Thread-safe; no method waits for compute.

    `setting` is what makes it larger. What it evicts is gone, unless `keep_below` says where it goes.
    """

    def __init__(
        self,
        *,
        eviction: str = "lru",
        tenants: Mapping[str, TenantConfig] | None = None,
        clock: Clock | None = None,
        setting: str = "engine.num_blocks",
    ) -> None:
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self._eviction = eviction
        self._tenants = tenants or {}
        self._clock = clock or SystemClock()
        self._setting = setting
        self._layout: KvLayout | None = None
        self._live: set[PoolAllocation] = set()
        self._below: Below | None = None
        self.moved_blocks = 0
        """By `migrate`; for telemetry."""
        self._block_cost: Cost = uniform
        self._memory: KvMemory = KvRegion(memoryview(b""), 0, 0)
        self._keep_books(PrefixCache(BlockManager(0), 1, self._make_eviction(0)))

    def open(self, layout: KvLayout, memory: KvMemory, cache: PrefixCache | None = None) -> None:
        """Gives the pool its memory, and the books of that where somebody else has them already. Once."""
        watchers = self.cache.watchers
        self._layout, self._memory = layout, memory
        policy = self._make_eviction(memory.num_blocks)
        if cache is None:
            cache = PrefixCache(BlockManager(memory.num_blocks), layout.block_size_tokens, policy)
        cache.policy = policy
        cache.watchers += watchers
        self._keep_books(cache)

    def keep_below(self, below: Below) -> None:
        """What is evicted from now on goes there, and comes back when it is allocated again."""
        with self.lock:
            self._below = below
            self.cache.evicting = lambda keys, blocks: below.keep(keys, self._memory, self._slots(blocks))
        below.watch(self._changed_below)

    def _changed_below(self, event: BlockEvent) -> None:
        """What goes down is told there before it is told to be gone here: it is never nowhere."""
        for callback in self.cache.watchers:
            callback(replace(event, tier=Tier.HOST))

    def _keep_books(self, cache: PrefixCache) -> None:
        self.cache, self.blocks = cache, cache.book
        self.quota = QuotaManager(cache.book.num_blocks, self._tenants, self._clock, cache.book.charged)

    # ---- KVBackendProtocol ----

    @property
    def layout(self) -> KvLayout:
        """Raises LayoutMismatch before it is known."""
        if self._layout is None:
            raise LayoutMismatch("the pool has no layout yet: its first put brings one")
        return self._layout

    def regions(self) -> KvMemory:
        return self._memory

    def allocate(self, token_ids: TokenIds, num_tokens: int, cache_salt: str = "", tenant: str = "") -> PoolAllocation:
        """See `KVBackendProtocol.allocate`."""
        size = self.layout.block_size_tokens
        usable = max(0, len(token_ids) - 1) // size * size if self.cache.enabled else 0
        root = root_hash(self.layout, cache_salt)
        hashes = block_hashes(token_ids[:usable], size, root)
        with self.lock:
            account = self.quota.account_of(tenant)
            shared = self.cache.find(hashes, token_ids, root)
            try:
                fresh = self._obtain(self._num_blocks(num_tokens) - len(shared), account)
            except SageError:
                self.cache.release(shared, used=False)
                raise
            table = np.concatenate([shared, fresh])
            allocation = self._hand_out(table, num_tokens, len(shared), hashes[: len(shared)], account)
        try:
            self._bring_back(allocation, hashes[: len(table)], token_ids, root)
        except BaseException:
            self.free(allocation)
            raise
        return allocation

    def bring_back(self, allocation: Allocation, token_ids: TokenIds, cache_salt: str = "") -> int:
        """See `KVBackendProtocol.bring_back`."""
        size, root = self.layout.block_size_tokens, root_hash(self.layout, cache_salt)
        usable = min(len(allocation.block_ids), max(0, len(token_ids) - 1) // size) * size
        hashes = block_hashes(token_ids[:usable], size, root)
        with self.lock:
            # Whoever frees the allocation meanwhile does not give its blocks to somebody else to write.
            held = self.hold_to_read(self._held(allocation).table)
        try:
            return self._bring_back(allocation, hashes, token_ids, root)
        finally:
            self.free(held)

    def _bring_back(
        self, allocation: Allocation, hashes: Sequence[BlockHash], token_ids: TokenIds, root: BlockHash
    ) -> int:
        """Fills fresh blocks with what was evicted. Without the lock: they are this allocation's alone."""
        size = self.layout.block_size_tokens
        first = max(allocation.num_shared_blocks, allocation.num_cached_tokens // size)
        allocation.more_below = False
        if self._below is None or first >= len(hashes):
            return 0
        slots = allocation.block_ids[first : len(hashes)]
        known = list(contexts(root, pack_int32(token_ids[: len(hashes) * size]), 4 * size))
        count = self._below.bring_back(
            hashes[first:], token_ids[first * size : len(hashes) * size], known[first:], self._memory, slots
        )
        allocation.num_cached_tokens += count * size
        allocation.more_below = count == self._below.most_blocks and first + count < len(hashes)
        origins = allocation.origins
        allocation.origins = replace(origins, host_tokens=origins.host_tokens + count * size)
        return count * size

    def lend(self, token_ids: TokenIds, cache_salt: str = "") -> PoolAllocation:
        """See `KVBackendProtocol.lend`. What is below stays there."""
        root = root_hash(self.layout, cache_salt)
        hashes = block_hashes(token_ids, self.layout.block_size_tokens, root) if self.cache.enabled else []
        with self.lock:
            found = self.cache.find(hashes, token_ids, root)
            lent = self._hand_out(found, len(found) * self.layout.block_size_tokens, len(found))
            lent.uses = False
            return lent

    def share(self, allocation: Allocation) -> PoolAllocation:
        """See `KVBackendProtocol.share`."""
        with self.lock:
            held = self._held(allocation)
            self.blocks.hold(held.table)
            shared = self._hand_out(held.table, held.num_tokens, held.num_shared_blocks, held.hashes, held.account)
            shared.num_cached_tokens = held.num_cached_tokens
            return shared

    def free(self, allocation: Allocation) -> None:
        """Drops the references. Idempotent."""
        assert isinstance(allocation, PoolAllocation)
        with self.lock:
            if allocation.live:
                self.cache.release(self.take(allocation), used=allocation.uses)

    def extend(self, allocation: Allocation, num_tokens: int) -> None:
        """See `KVBackendProtocol.extend`."""
        with self.lock:
            held = self._held(allocation)
            fresh = self._obtain(self._num_blocks(num_tokens) - len(held.table), held.account)
            held.num_tokens = max(held.num_tokens, num_tokens)
            self._retable(held, np.concatenate([held.table, fresh]))

    def make_writable(self, allocation: Allocation, begin_token: int) -> int:
        """See `KVBackendProtocol.make_writable`: copies, in this call, what others hold, too."""
        with self.lock:
            held = self._held(allocation)
            first = begin_token // self.layout.block_size_tokens
            shared = int(np.count_nonzero(self.blocks.ref_counts[held.table[first:]] > 1))
            self._make_room(shared, held.account)
            cow = self.blocks.copy_on_write(held.table, first, held.account)
            copy_blocks(self._memory, self._slots(cow.originals), self._slots(cow.copies))
            self._retable(held, cow.table)
            self.cache.release(cow.originals)
            held.num_shared_blocks = min(held.num_shared_blocks, first)
            return shared

    def cached_hashes(self) -> list[BlockHash]:
        with self.lock:
            return self.cache.hashes()

    def cached_by_tier(self) -> Mapping[Tier, list[BlockHash]]:
        """See `TieredCache`: of an engine's pool, and of the host memory below it."""
        below = {Tier.HOST: self._below.hashes()} if self._below else {}
        return {Tier.DEVICE: self.cached_hashes(), **below}

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Called with the pool's lock held, or with that of what is below: in order, but it must not call back."""
        with self.lock:
            self.cache.watchers.append(callback)

    def get_utilization(self) -> KvStats:
        with self.lock:
            # Asked ten times a second beside the engine: a mask is made of a few calls, sets of a hundred.
            used = np.zeros(len(self.blocks.ref_counts), np.bool_)
            for table in self.tables():
                used[table.blocks] = True
            cached = self.cache.blocks()
            return KvStats(
                total_blocks=self._memory.num_blocks,
                free_blocks=self.blocks.num_free,
                used_blocks=int(np.count_nonzero(used)),
                cached_blocks=len(cached) - int(np.count_nonzero(used[cached])),
                tiers=(self._below.stats(),) if self._below else (),
            )

    def get_block_info(self, block_ids: BlockIds) -> list[BlockInfo]:
        """See `KVBackendProtocol.get_block_info`."""
        with self.lock:
            if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < self._memory.num_blocks:
                raise IndexError(f"blocks {block_ids.tolist()} are not all in the pool of {self._memory.num_blocks}")
            _, pinned = self.slot_map()
            return [
                BlockInfo(
                    block_id=slot,
                    ref_count=int(self.blocks.ref_counts[block]),
                    block_hash=self.cache.hash_of(block),
                    pinned=bool(pinned[slot]),
                    tenant=self.quota.tenant_of(self.blocks.accounts[block]) if self.blocks.ref_counts[block] else "",
                )
                for slot, block in zip(block_ids.tolist(), self.blocks.blocks_at(block_ids).tolist(), strict=True)
            ]

    def migrate(self, plan: BlockMoves) -> int:
        """See `KVBackendProtocol.migrate`."""
        with self.lock:
            free, pinned = self.slot_map()
            possible = free[plan.destinations] & ~free[plan.sources] & ~pinned[plan.sources]
            sources, destinations = plan.sources[possible], plan.destinations[possible]
            copy_blocks(self._memory, sources, destinations)
            self.blocks.move(sources, destinations)
            self.moved_blocks += len(sources)
            return len(sources)

    def get_fragmentation(self) -> KvFragmentation:
        """See `KvFragmentation`; blocks of the cache alone are full."""
        size = self.layout.block_size_tokens
        with self.lock:
            filled = np.zeros(self.blocks.num_blocks, np.int64)
            filled[self.cache.blocks()] = size
            for table in self.tables():
                tokens = np.clip(table.num_tokens - size * np.arange(len(table.blocks)), 0, size)
                filled[table.blocks] = np.maximum(filled[table.blocks], tokens)
            held = int(np.count_nonzero(self.blocks.ref_counts)) * size
            return defrag.fragmentation(self.slot_map()[0], held, held - int(filled.sum()))

    @property
    def eviction(self) -> str:
        return self._eviction

    def set_eviction(self, name: str) -> None:
        """From now on; what is cached stays. Raises ConfigError, having changed nothing."""
        with self.lock:
            cache = self.cache
            cache.policy = swap_eviction(
                cache.policy, name, self._memory.num_blocks, self._cost_of, lambda block: cache[block].key.depth
            )
            self._eviction = name

    def price(self, cost: Cost) -> None:
        """See `KVBackendProtocol.price`."""
        self._block_cost = cost

    def _cost_of(self, depth: int) -> float:
        """By what is known at that time."""
        return self._block_cost(depth)

    def _make_eviction(self, num_blocks: int) -> EvictionPolicy[BlockHash]:
        return make_eviction(self._eviction, num_blocks, self._cost_of)

    # ---- for those who know that it is a KVPool ----

    @property
    def block_bytes(self) -> int:
        return self._memory.block_bytes

    def defragment(self, max_bytes: int) -> int:
        """Moves blocks of at most max_bytes towards one free run; returns how many. Free blocks are allocated by rising
        place from then on, also when none was moved. Under the lock: keep it small."""
        with self.lock:
            moved = defrag.defragment(self, max_bytes)
            self.blocks.order_free()
            return moved

    @property
    def rejected(self) -> int:
        """Blocks that were found by name, here or below, and were not those asked for."""
        return self.cache.matcher.rejected + (self._below.rejected if self._below else 0)

    @property
    def lifetime_skill(self) -> float:
        """How well the eviction policy foretells whether blocks are used again (`LifetimePredictor.skill`); 0 where it
        does not."""
        with self.lock:
            policy = self.cache.policy
            return policy.lifetimes.skill if isinstance(policy, CostAware) else 0.0

    def tenant_usage(self) -> list[TenantUsage]:
        """Empty where kv.tenants names none."""
        with self.lock:
            return self.quota.usage()

    def publish(self, allocation: Allocation, token_ids: TokenIds, cache_salt: str = "") -> None:
        """The blocks hold KV of these tokens: the full ones are found from now on. Copies of cached ones stay private.

        The allocation keeps its references, and must not write its full blocks any more.
        """
        root = root_hash(self.layout, cache_salt)
        hashes = block_hashes(token_ids, self.layout.block_size_tokens, root)
        with self.lock:
            held = self._held(allocation)
            keys = keys_of(hashes, token_ids, self.layout.block_size_tokens, before=root)
            count = min(len(keys), len(held.table))
            self.cache.insert(keys[:count], held.table[:count])

    def hold_to_read(self, table: BlockArray) -> PoolAllocation:
        """References on blocks that are held, so that they stay and stay where they are. No use of them. For `free`.
        The lock is held."""
        self.blocks.hold(table)
        allocation = self._hand_out(table, len(table) * self.layout.block_size_tokens, 0)
        allocation.uses = False
        return allocation

    def take(self, allocation: PoolAllocation) -> BlockArray:
        """Hands the references over to the caller; a later `free` is a no-op. The lock is held."""
        self._held(allocation)
        allocation.live = False
        self._live.discard(allocation)
        return allocation.table

    def slot_map(self) -> tuple[defrag.Mask, defrag.Mask]:
        """(free, pinned), slot by slot. The lock is held."""
        free = np.zeros(self._memory.num_blocks, np.bool_)
        free[self.blocks.slots(self.blocks.free_blocks())] = True
        pinned = np.zeros_like(free)
        for table in self.tables():
            if table.pinned:
                pinned[self.blocks.slots(table.blocks)] = True
        return free, pinned

    # ---- what pools of a kind add to ----

    def tables(self) -> Iterator[Table]:
        """Of all holders but the cache. The lock is held."""
        for allocation in self._live:
            yield Table(allocation.table, allocation.num_tokens)

    def _headroom(self) -> int:
        """Blocks that are to stay free for those who hold some already."""
        return 0

    # ---- the lock is held from here on ----

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.layout.block_size_tokens)

    def _held(self, allocation: Allocation) -> PoolAllocation:
        assert isinstance(allocation, PoolAllocation)
        if not allocation.live:
            raise ValueError("the allocation was freed or handed over before: its blocks may be somebody else's")
        return allocation

    def _slots(self, blocks: BlockArray) -> BlockIds:
        return self.blocks.slots(blocks).astype(np.int32)

    def _obtain(self, count: int, account: int) -> BlockArray:
        """Fresh blocks. Raises KvExhausted or TenantQuota, having taken nothing."""
        self._make_room(count, account)
        return self.blocks.allocate(max(0, count), account)

    def _make_room(self, count: int, account: int) -> None:
        """`count` blocks are free for the account afterwards. Raises KvExhausted or TenantQuota."""
        if count <= 0:
            return
        self.quota.check_borrowing(account, count)
        headroom = self._headroom()
        possible, evictions = self._room(count, account, headroom)
        if possible < count or not self._evict(evictions):
            kept = f" and {headroom} kept for running sequences" if headroom else ""
            raise self.quota.refusal(account, count) or KvExhausted(
                f"{count} more KV blocks wanted, {self.blocks.num_free} of {self._memory.num_blocks} free{kept}: "
                f"try again, or raise {self._setting}",
                retry_after_s=0.1,
            )
        self.quota.served(account)

    def _room(self, count: int, account: int, headroom: int) -> tuple[int, list[tuple[int | None, int]]]:
        """How many of `count` fresh blocks the account can have beside `headroom`, and whose cached ones are to be
        evicted for it."""
        quota, free = self.quota, self.blocks.num_free
        beyond = quota.beyond_limit(account, count)
        if beyond <= 0 and count + headroom <= free:
            return count, []
        idle = self.cache.idle_by_account(quota.num_accounts)
        evictions: list[tuple[int | None, int]] = []
        if beyond > 0:
            own = min(beyond, int(idle[account]))
            count -= beyond - own
            free, idle[account] = free + own, idle[account] - own
            evictions.append((account, own))
        if not quota.enabled:
            gone = max(0, min(count + headroom - free, int(idle.sum())))
            return min(count, free + gone - headroom), [(None, gone)]
        for victim, most in quota.reclaim_from(account, count):
            gone = max(0, min(count + headroom - free, most, int(idle[victim])))
            free, idle[victim] = free + gone, idle[victim] - gone
            evictions.append((victim, gone))
        return max(0, min(count, free - headroom)), evictions

    def _evict(self, evictions: Sequence[tuple[int | None, int]]) -> bool:
        """Whether the policy gave up all of them."""
        evicted = [self.cache.evict(count, account) for account, count in evictions]
        return evicted == [count for _, count in evictions]

    def _hand_out(
        self, table: BlockArray, num_tokens: int, num_shared: int, hashes: Sequence[BlockHash] = (), account: int = 0
    ) -> PoolAllocation:
        cached = num_shared * self.layout.block_size_tokens
        made = PoolAllocation(self._slots(table), cached, num_shared, table, num_tokens, list(hashes), account)
        self._live.add(made)
        return made

    def _retable(self, allocation: PoolAllocation, table: BlockArray) -> None:
        allocation.table, allocation.block_ids = table, self._slots(table)


def copy_blocks(memory: KvMemory, sources: BlockIds, destinations: BlockIds) -> None:
    """The bytes of blocks `sources` to blocks `destinations`, which are others."""
    if len(sources) == 0:
        return
    with memory.reading(sources) as (region, from_ids), memory.writing(destinations) as (target, to_ids):
        bytes_from = np.frombuffer(region.view, np.uint8).reshape(-1, region.block_bytes)
        bytes_to = np.frombuffer(target.view, np.uint8).reshape(-1, target.block_bytes)
        bytes_to[to_ids] = bytes_from[from_ids]
