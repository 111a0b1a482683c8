"""LMDeploy's KV blocks under our rule: its prefix cache over chained hashes, and the pool that the services see.

`EnginePrefixCache` stands where LMDeploy has its BlockTrie: `SequenceManager.fetch` calls `match` before it allocates,
`SequenceManager.store` calls `allocate`, the eviction helper calls `evict`. Blocks become shareable through `publish`,
after their KV was computed, never before: a failed step publishes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm_common.core.clock import Clock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.kv import Allocation, KvMemory
from sagellm_common.core.types import BlockHash, KvLayout, TokenIds
from sagellm_common.kv_policy.eviction import make_eviction
from sagellm_common.kv_runtime.block_manager import BlockArray, BlockManager
from sagellm_common.kv_runtime.pool import KVPool, PoolAllocation, Table
from sagellm_common.kv_runtime.prefix_cache import PrefixCache
from sagellm_common.kv_runtime.tiers import keys_of
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash

if TYPE_CHECKING:
    from sagellm_common.engines.lmdeploy.block_manager import KvBlockManager


@dataclass(slots=True)
class SequencePrefix:
    """How far one sequence's blocks are known to the cache, and who is charged for its blocks."""

    root: BlockHash
    hashes: list[BlockHash] = field(default_factory=list)
    account: int = 0
    context: bytes = b""
    """That of the last of them, or the root; empty: not known."""

    def __post_init__(self) -> None:
        if not self.hashes:
            self.context = self.root

    @property
    def parent(self) -> BlockHash:
        return self.hashes[-1] if self.hashes else self.root


class EnginePrefixCache(PrefixCache):
    """The prefix cache, asked by LMDeploy's scheduler. Guarded by the block manager's lock."""

    def __init__(self, blocks: BlockManager, block_size_tokens: int) -> None:
        super().__init__(blocks, block_size_tokens, make_eviction("lru", blocks.num_blocks))
        self._block_size = block_size_tokens
        self.prefixes: dict[int, SequencePrefix] = {}
        """session id → prefix, for the sequences LMDeploy schedules."""
        self.at_work: Any = None
        """The sequence that LMDeploy asked for last; whose fault it is when it fails in the middle."""

    def lookup(self, token_ids: TokenIds, root: BlockHash) -> tuple[list[BlockHash], BlockArray]:
        """The longest cached prefix that leaves at least one token to compute. Takes a reference on each block."""
        usable = max(0, len(token_ids) - 1) // self._block_size * self._block_size
        hashes = block_hashes(token_ids[:usable], self._block_size, root) if self.enabled else []
        blocks = self.find(hashes, token_ids, root)
        return hashes[: len(blocks)], blocks

    def begin(self, prefix: SequencePrefix, hashes: list[BlockHash]) -> None:
        """The sequence begins with these blocks, which it holds."""
        last = self.key(hashes[-1]) if hashes else None
        prefix.hashes, prefix.context = hashes, last.context if last else (b"" if hashes else prefix.root)

    def publish(self, prefix: SequencePrefix, token_ids: TokenIds, blocks: BlockArray, num_computed: int) -> None:
        """Makes a sequence's full blocks shareable, up to num_computed tokens. A block computed twice stays private.

        So does one whose parent is not cached (any more): nobody would find it.
        """
        start, full = len(prefix.hashes), num_computed // self._block_size
        if not self.enabled or full <= start:
            return
        fresh = token_ids[start * self._block_size : full * self._block_size].astype("<i4", copy=False)
        hashes = block_hashes(fresh, self._block_size, prefix.parent)
        keys = keys_of(hashes, fresh, self._block_size, prefix.parent, prefix.context, depths=range(start, full))
        prefix.hashes += hashes
        prefix.context = keys[-1].context
        findable, reachable = [], {prefix.root}
        for key, block in zip(keys, blocks[start:full].tolist(), strict=True):
            if key.hash in self or key.parent in reachable or key.parent in self:
                reachable.add(key.hash)
                findable.append((key, block))
        self.insert([key for key, _ in findable], np.array([block for _, block in findable], np.int64))

    # ---- what LMDeploy calls ----

    def match(self, seq: Any) -> None:
        """Attaches the cached prefix to a sequence that has no blocks yet (new, or evicted and to be recomputed)."""
        self.at_work = seq
        prefix = self.prefixes[seq.session_id]
        if len(seq.logical_blocks):
            return
        hashes, blocks = self.lookup(seq.all_ids.astype(np.int32), prefix.root)
        self.begin(prefix, hashes)
        if len(blocks):
            seq.logical_blocks.append(blocks)
            seq.set_step(len(blocks) * self._block_size)

    def allocate(self, seq: Any) -> None:
        """Publishes what is computed. LMDeploy calls it when a sequence got the blocks of its next step, which hold
        nothing yet; the engine calls it after the step."""
        prefix = self.prefixes[seq.session_id]
        if seq.num_history_ids // self._block_size > len(prefix.hashes):
            self.publish(prefix, seq.all_ids, seq.logical_blocks.get_real_blocks(), seq.num_history_ids)


class LmdeployKvPool(KVPool):
    """The `KVPool` that LMDeploy's own block manager allocates from.

    `lock` guards LMDeploy's scheduler, its block manager and the prefix cache. The engine holds it while it schedules
    and while it collects results, not while it computes: allocate and free wait microseconds, not a step.
    """

    cache: EnginePrefixCache

    def __init__(
        self,
        manager: KvBlockManager,
        scheduler: Any,
        layout: KvLayout,
        memory: KvMemory,
        prefix_caching: bool,
        eviction: str = "lru",
        *,
        tenants: Mapping[str, TenantConfig] | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(eviction=eviction, tenants=tenants, clock=clock)
        self.lock = manager.lock
        self._scheduler = scheduler
        self._on_free: Callable[[], None] = lambda: None
        self._defrag_bytes = 0
        self.open(layout, memory, manager.cache)
        self.cache.enabled = prefix_caching
        manager.make_room = self.make_room_for_sequence
        manager.borrows = lambda account: self.quota.enabled and self.quota.borrowed(account) > 0

    def root(self, cache_salt: str) -> BlockHash:
        return root_hash(self.layout, cache_salt)

    def free(self, allocation: Allocation) -> None:
        super().free(allocation)
        self._on_free()

    def tables(self) -> Iterator[Table]:
        """A sequence's blocks stay where they are while a step computes on it."""
        yield from super().tables()
        computing = {seq.seq_id for seq in self._scheduler.locked}
        for seq in self._scheduler.seq_manager.get_all_sequences():
            blocks = seq.logical_blocks.get_real_blocks()
            yield Table(blocks, int(seq.num_all_ids), pinned=seq.seq_id in computing)

    def _headroom(self) -> int:
        """Running sequences must be able to grow into their next block, or they would preempt each other."""
        return int(self._scheduler.num_running() + self._scheduler.num_locked())

    def defragment(self, max_bytes: int) -> int:
        """While a step computes, where most blocks must stay, it is left to the engine, for after the step."""
        with self.lock:
            if self._scheduler.num_locked():
                self._defrag_bytes = max_bytes
                return 0
            return super().defragment(max_bytes)

    # ---- for the engine ----

    @property
    def waits_for_a_steps_end(self) -> bool:
        """Whether `between_steps` has something to do."""
        return self._defrag_bytes > 0

    def between_steps(self) -> None:
        """Nothing computes, and the lock is held."""
        if self.waits_for_a_steps_end:
            max_bytes, self._defrag_bytes = self._defrag_bytes, 0
            self.defragment(max_bytes)

    def on_free(self, callback: Callable[[], None]) -> None:
        self._on_free = callback

    def hold(self, blocks: Iterable[int], num_cached_tokens: int) -> PoolAllocation:
        """References on a finishing sequence's blocks, the valid ones."""
        held = np.array(list(blocks)[: self._num_blocks(num_cached_tokens)], dtype=np.int64)
        self.blocks.hold(held)
        allocation = self._hand_out(held, num_cached_tokens, 0)
        allocation.num_cached_tokens = num_cached_tokens
        return allocation

    def make_room_for_sequence(self, count: int, account: int) -> None:
        """Evicts what a sequence's next `count` blocks need, as far as there is something. The lock is held."""
        self._evict(self._room(count, account, headroom=0)[1])
