"""LMDeploy's KV blocks under our rule: a prefix cache over chained hashes, and the pool as KVBackendProtocol.

`PrefixCache` stands where LMDeploy has its BlockTrie: `SequenceManager.fetch` calls `match` before it allocates,
`SequenceManager.store` calls `allocate`, the eviction helper calls `evict`. Blocks become shareable through `publish`,
after their KV was computed, never before: a failed step publishes nothing. A use of blocks counts when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.errors import KvExhausted
from sagellm_common.core.kv import Allocation, BlockEvent, KvMemory
from sagellm_common.core.types import BlockHash, KvLayout, KvStats, TokenIds, pack_int32
from sagellm_common.kv_policy.eviction import make_eviction, swap_eviction
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash

if TYPE_CHECKING:
    from sagellm_common.engines.lmdeploy.block_manager import KvBlockManager

BlockArray = NDArray[np.int64]


@dataclass(slots=True)
class CachedBlock:
    block: int  # logical id
    token_ids: bytes


@dataclass(slots=True)
class SequencePrefix:
    """How far one sequence's blocks are known to the cache."""

    root: BlockHash
    hashes: list[BlockHash] = field(default_factory=list)

    @property
    def parent(self) -> BlockHash:
        return self.hashes[-1] if self.hashes else self.root


class PrefixCache:
    """Block hash → block, with one reference on each block it holds. Guarded by the block manager's lock."""

    def __init__(
        self, allocator: Any, block_size_tokens: int, num_blocks: int, enabled: bool = True, eviction: str = "lru"
    ) -> None:
        self._allocator = allocator
        self._block_size = block_size_tokens
        self._num_blocks = num_blocks
        self.enabled = enabled
        self._entries: dict[BlockHash, CachedBlock] = {}
        self._holds = np.zeros(num_blocks, dtype=bool)
        """By logical block."""
        self._eviction_name = eviction
        self._eviction = make_eviction(eviction, num_blocks)
        self._in_first_use: dict[BlockHash, None] = {}
        """Those that `_eviction` has not heard of yet."""
        self._watchers: list[Callable[[BlockEvent], None]] = []
        self.prefixes: dict[int, SequencePrefix] = {}
        """session id → prefix, for the sequences LMDeploy schedules."""
        self.at_work: Any = None
        """The sequence that LMDeploy asked for last; whose fault it is when it fails in the middle."""

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        self._watchers.append(callback)

    def hashes(self) -> list[BlockHash]:
        return list(self._entries)

    def blocks(self) -> BlockArray:
        """Each of them once."""
        return np.flatnonzero(self._holds)

    def lookup(self, token_ids: TokenIds, root: BlockHash) -> tuple[list[BlockHash], BlockArray]:
        """The longest cached prefix that leaves at least one token to compute. Takes a reference on each block."""
        found: list[BlockHash] = []
        blocks: list[int] = []
        usable = (len(token_ids) - 1) // self._block_size * self._block_size if self.enabled else 0
        packed, step = pack_int32(token_ids[:usable]), 4 * self._block_size
        for i, key in enumerate(block_hashes(token_ids[:usable], self._block_size, root)):
            entry = self._entries.get(key)
            if entry is None or entry.token_ids != packed[i * step : (i + 1) * step]:
                break
            found.append(key)
            blocks.append(entry.block)
        array = np.array(blocks, dtype=np.int64)
        if blocks:
            self._allocator.add_ref_count(array, 1)
        return found, array

    def publish(self, prefix: SequencePrefix, token_ids: TokenIds, blocks: BlockArray, num_computed: int) -> None:
        """Makes a sequence's full blocks shareable, up to num_computed tokens. A block computed twice stays private.

        So does one whose parent is not cached (any more): nobody would find it.
        """
        full = num_computed // self._block_size
        if not self.enabled or full <= len(prefix.hashes):
            return
        start = len(prefix.hashes)
        fresh = token_ids[start * self._block_size : full * self._block_size].astype("<i4", copy=False)
        packed, step = pack_int32(fresh), 4 * self._block_size
        stored, published = [], []
        for offset, key in enumerate(block_hashes(fresh, self._block_size, prefix.parent)):
            parent = prefix.parent
            prefix.hashes.append(key)
            if key in self._entries or (parent != prefix.root and parent not in self._entries):
                continue
            tokens = packed[offset * step : (offset + 1) * step]
            block = int(blocks[start + offset])
            self._entries[key] = CachedBlock(block, tokens)
            self._in_first_use[key] = None
            published.append(block)
            stored.append(key)
        self._allocator.add_ref_count(np.array(published, dtype=np.int64), 1)
        self._holds[published] = True
        self._tell(BlockEvent(stored=tuple(stored)))

    def used(self, hashes: Sequence[BlockHash]) -> None:
        """A sequence's blocks were used, and are so no longer by it: what is counted and ordered for eviction."""
        path = [key for key in hashes if key in self._entries]
        for key in path:
            self._in_first_use.pop(key, None)
        self._eviction.access(path)

    def leave(self, session_id: int) -> None:
        """The session ends."""
        self.used(self.prefixes.pop(session_id).hashes)

    # ---- which blocks go ----

    @property
    def eviction(self) -> str:
        return self._eviction_name

    def set_eviction(self, name: str) -> None:
        """From now on; what is cached stays. Raises ConfigError, having changed nothing."""
        self._eviction = swap_eviction(self._eviction, name, self._num_blocks)
        self._eviction_name = name

    # ---- what LMDeploy calls ----

    def match(self, seq: Any) -> None:
        """Attaches the cached prefix to a sequence that has no blocks yet (new, or evicted and to be recomputed)."""
        self.at_work = seq
        prefix = self.prefixes[seq.session_id]
        if len(seq.logical_blocks):
            return
        prefix.hashes, blocks = self.lookup(seq.all_ids.astype(np.int32), prefix.root)
        if len(blocks):
            seq.logical_blocks.append(blocks)
            seq.set_step(len(blocks) * self._block_size)

    def allocate(self, seq: Any) -> None:
        """Publishes what is computed. LMDeploy calls it when a sequence got the blocks of its next step, which hold
        nothing yet; the engine calls it after the step."""
        prefix = self.prefixes[seq.session_id]
        if seq.num_history_ids // self._block_size > len(prefix.hashes):
            self.publish(prefix, seq.all_ids, seq.logical_blocks.get_real_blocks(), seq.num_history_ids)

    def evict(self, max_num_blocks: int) -> int:
        """Frees up to max_num_blocks blocks that nobody but the cache holds, as the policy ranks them."""
        in_use = _InUse(self._entries, self._allocator)
        removed = self._eviction.evict(max_num_blocks, in_use)
        if len(removed) < max_num_blocks:
            # Their first user lost them before it ended.
            self.used([key for key in self._in_first_use if key not in in_use])
            removed += self._eviction.evict(max_num_blocks - len(removed), in_use)
        freed = np.array([self._entries.pop(key).block for key in removed], dtype=np.int64)
        self._holds[freed] = False
        self._allocator.free(freed)
        self._tell(BlockEvent(removed=tuple(removed)))
        return len(removed)

    def _tell(self, event: BlockEvent) -> None:
        if event.stored or event.removed:
            for callback in self._watchers:
                callback(event)


class _InUse(Container[BlockHash]):
    """Cached blocks that a sequence or an allocation holds, too."""

    def __init__(self, entries: Mapping[BlockHash, CachedBlock], allocator: Any) -> None:
        self._entries = entries
        self._ref_counts = allocator.get_ref_count(slice(None))

    def __contains__(self, key: object) -> bool:
        return bool(self._ref_counts[self._entries[key].block] > 1)  # type: ignore[index]


@dataclass(slots=True, eq=False)
class EngineAllocation(Allocation):
    """`block_ids` are physical; LMDeploy counts references on logical blocks. `live` until freed or handed over."""

    logical: BlockArray = field(default_factory=lambda: np.empty(0, np.int64))
    hashes: list[BlockHash] = field(default_factory=list)
    live: bool = True

    def was_filled(self, block_size_tokens: int) -> bool:
        """Whether its holder brought KV from elsewhere, beyond what the cache had."""
        return self.num_cached_tokens > self.num_shared_blocks * block_size_tokens


class LmdeployKvPool:
    """Block manager and cache engine as a KVBackendProtocol.

    `lock` guards LMDeploy's scheduler, its block manager and the prefix cache. The engine holds it while it schedules
    and while it collects results, not while it computes: allocate and free wait microseconds, not a step.
    """

    def __init__(
        self,
        manager: KvBlockManager,
        scheduler: Any,
        layout: KvLayout,
        memory: KvMemory,
        prefix_caching: bool,
        eviction: str = "lru",
    ) -> None:
        self.lock = manager.lock
        self.layout = layout
        self.cache = manager.cache
        self.cache.enabled = prefix_caching
        self.cache.set_eviction(eviction)
        self._scheduler = scheduler
        self._manager = manager
        self._allocator = manager.allocator
        self._memory = memory
        self._live: set[EngineAllocation] = set()
        self._on_free: Callable[[], None] = lambda: None

    def root(self, cache_salt: str) -> BlockHash:
        return root_hash(self.layout, cache_salt)

    def allocate(self, token_ids: TokenIds, num_tokens: int, cache_salt: str = "") -> EngineAllocation:
        with self.lock:
            hashes, shared = self.cache.lookup(token_ids, self.root(cache_salt))
            missing = -(-num_tokens // self.layout.block_size_tokens) - len(shared)
            # Running sequences must be able to grow into their next block, or they would preempt each other.
            headroom = self._scheduler.num_running() + self._scheduler.num_locked()
            short = missing + headroom - self._manager.get_num_free_gpu_blocks()
            if short > 0:
                self.cache.evict(short)
            if missing + headroom > self._manager.get_num_free_gpu_blocks():
                self._allocator.free(shared)
                raise KvExhausted(
                    f"{missing} KV blocks wanted, {self._manager.get_num_free_gpu_blocks()} free and {headroom} kept "
                    f"for running sequences; try again, or raise engine.num_blocks ({self._memory.num_blocks})",
                    retry_after_s=0.5,
                )
            logical = np.concatenate([shared, self._allocator.allocate(missing)])
            return self._hold(logical, len(shared) * self.layout.block_size_tokens, len(shared), hashes)

    def share(self, allocation: Allocation) -> EngineAllocation:
        assert isinstance(allocation, EngineAllocation)
        with self.lock:
            if not allocation.live:
                raise ValueError("the allocation was freed or handed over before")
            self._allocator.add_ref_count(allocation.logical, 1)
            cached, shared = allocation.num_cached_tokens, allocation.num_shared_blocks
            return self._hold(allocation.logical, cached, shared, allocation.hashes)

    def free(self, allocation: Allocation) -> None:
        assert isinstance(allocation, EngineAllocation)
        with self.lock:
            if allocation.live:
                self._allocator.free(self.take(allocation))
                self.cache.used(allocation.hashes)
        self._on_free()

    @property
    def eviction(self) -> str:
        return self.cache.eviction

    def set_eviction(self, name: str) -> None:
        """See `PrefixCache.set_eviction`."""
        with self.lock:
            self.cache.set_eviction(name)

    def cached_hashes(self) -> list[BlockHash]:
        with self.lock:
            return self.cache.hashes()

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        with self.lock:
            self.cache.watch(callback)

    def get_utilization(self) -> KvStats:
        with self.lock:
            sequences = self._scheduler.seq_manager.get_all_sequences()
            used = np.unique(
                np.concatenate(
                    [
                        np.empty(0, np.int64),
                        *(s.logical_blocks.get_real_blocks() for s in sequences),
                        *(a.logical for a in self._live),
                    ]
                )
            )
            return KvStats(
                total_blocks=self._memory.num_blocks,
                free_blocks=int(self._allocator.get_num_free_blocks()),
                used_blocks=len(used),
                cached_blocks=len(np.setdiff1d(self.cache.blocks(), used, assume_unique=True)),
            )

    def regions(self) -> KvMemory:
        return self._memory

    # ---- for the engine ----

    def on_free(self, callback: Callable[[], None]) -> None:
        self._on_free = callback

    def take(self, allocation: EngineAllocation) -> BlockArray:
        """Hands the references over to the caller; a later `free` is a no-op."""
        if not allocation.live:
            raise ValueError("the allocation was freed or handed over before")
        allocation.live = False
        self._live.discard(allocation)
        return allocation.logical

    def hold(self, logical: Iterable[int], num_cached_tokens: int) -> EngineAllocation:
        """References on a finishing sequence's blocks, the valid ones."""
        count = -(-num_cached_tokens // self.layout.block_size_tokens)
        blocks = np.array(list(logical)[:count], dtype=np.int64)
        self._allocator.add_ref_count(blocks, 1)
        return self._hold(blocks, num_cached_tokens, 0, [])

    def _hold(self, logical: BlockArray, cached: int, shared: int, hashes: list[BlockHash]) -> EngineAllocation:
        physical = self._allocator.get_physical_blocks(logical).astype(np.int32)
        allocation = EngineAllocation(physical, cached, shared, logical, hashes)
        self._live.add(allocation)
        return allocation
