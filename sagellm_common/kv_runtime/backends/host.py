"""KV blocks in host memory, found by the hash of their content: the pool of kv_store.

absent ──begin_put──► filling ──commit_put──► stored, unreferenced ◄──► stored, referenced
  ▲                      │ abort_put                 │ evicted            by get, pin, allocate
  └──────────────────────┴───────────────────────────┘

Which ones go is the eviction policy's choice. It hears of a use when it ends: a put's at its commit, others' in `free`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core import shared_memory
from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import ConfigError, InvalidRequest, KvExhausted, LayoutMismatch
from sagellm_common.core.kv import Allocation, BlockEvent, KvRegion
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvStats, TokenIds, pack_int32
from sagellm_common.kv_policy.eviction import EvictionPolicy, make_eviction, swap_eviction
from sagellm_common.kv_runtime.tiers import BlockKey, keys_of, paths
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash

_NO_MEMORY = KvRegion(memoryview(b""), 0, 0)


@dataclass(frozen=True, slots=True)
class _Stored:
    block_id: int
    token_bytes: bytes
    parent: BlockHash = b""


@dataclass(frozen=True, slots=True, eq=False)
class PendingPut:
    """Blocks to be filled: allocation.block_ids[i] is for the put's hash number positions[i]. `offered` are all of
    the put's keys."""

    positions: BlockIds
    keys: tuple[BlockKey, ...]
    allocation: Allocation
    offered: tuple[BlockKey, ...]
    num_present: int
    """How many of the put's hashes are stored already."""

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        return tuple(key.hash for key in self.keys)


class _Referenced(Container[BlockHash]):
    """Stored blocks that somebody holds."""

    def __init__(self, stored: Mapping[BlockHash, _Stored], refs: NDArray[np.int32]) -> None:
        self._stored = stored
        self._refs = refs

    def __contains__(self, block_hash: object) -> bool:
        return bool(self._refs[self._stored[block_hash].block_id])  # type: ignore[index]


class HostKvPool:
    """A `KVBackendProtocol`, and content-addressed puts and gets beside it. Thread-safe.

    The pool takes the first layout it is given, with budget_bytes of memory that the system provides as it is
    touched; another layout is refused with LayoutMismatch from then on. `setting` is what gives it more.
    `eviction` names a policy of kv_policy.
    """

    def __init__(
        self,
        budget_bytes: int,
        clock: Clock,
        layout: KvLayout | None = None,
        setting: str = "kv_store.budget_bytes",
        eviction: str = "lru",
    ) -> None:
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._setting = setting
        self._lock = threading.Lock()
        self._watchers: list[Callable[[BlockEvent], None]] = []
        self._layout: KvLayout | None = None
        self._region = _NO_MEMORY
        self._free: list[int] = []
        self._refs = np.zeros(0, dtype=np.int32)
        self._stored: dict[BlockHash, _Stored] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._num_cached = 0
        """Stored and unreferenced."""
        self._eviction_name = eviction
        self._eviction: EvictionPolicy[BlockHash] = make_eviction(eviction, 0)
        """Of what is stored; all that is unreferenced is known to it."""
        self._filling: set[BlockHash] = set()
        self._held: dict[int, Allocation] = {}
        """The allocations out there, by id(): what makes `free` idempotent."""
        self._copied: set[int] = set()
        """Of these, the ones that are no use of their blocks."""
        self._pins: dict[BlockHash, float] = {}
        self.outcomes: Counter[str] = Counter()
        """Blocks that were stored, evicted, hit and missed; for telemetry."""
        if layout is not None:
            self.adopt(layout)

    # ---- what there is ----

    @property
    def layout(self) -> KvLayout:
        """Raises LayoutMismatch before the first one is known."""
        if self._layout is None:
            raise LayoutMismatch("the pool has no layout yet: its first put brings one")
        return self._layout

    def adopt(self, layout: KvLayout) -> None:
        """Settles the layout or checks it. Raises LayoutMismatch, ConfigError when not one block fits the budget."""
        with self._lock:
            if self._layout is None:
                self._settle(layout)
        self.check_layout(layout)

    def check_layout(self, layout: KvLayout) -> bool:
        """Raises LayoutMismatch for another layout than the settled one; False when there is none yet."""
        if self._layout is None:
            return False
        differences = self._layout.differences(layout)
        if differences:
            listed = ", ".join(f"{name} is {mine!r}, not {theirs!r}" for name, (mine, theirs) in differences.items())
            raise LayoutMismatch(
                f"the pool holds KV of another layout: {listed}; restart it to serve another model",
                metadata={name: f"{mine}|{theirs}" for name, (mine, theirs) in differences.items()},
            )
        return True

    def regions(self) -> KvRegion:
        """Empty before the first layout."""
        return self._region

    def get_utilization(self) -> KvStats:
        with self._lock:
            self._expire_pins()
            return KvStats(
                total_blocks=self._region.num_blocks,
                free_blocks=len(self._free),
                used_blocks=int(np.count_nonzero(self._refs)),
                cached_blocks=self._num_cached,
            )

    def cached_hashes(self) -> list[BlockHash]:
        with self._lock:
            return list(self._stored)

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Called with the pool's lock held: in order, but it must not call back into the pool."""
        with self._lock:
            self._watchers.append(callback)

    # ---- which blocks go ----

    @property
    def eviction(self) -> str:
        return self._eviction_name

    def set_eviction(self, name: str) -> None:
        """From now on; what is stored stays. Raises ConfigError, having changed nothing."""
        with self._lock:
            self._eviction = swap_eviction(self._eviction, name, self._region.num_blocks)
            self._eviction_name = name

    # ---- by token ids: KVBackendProtocol ----

    def allocate(self, token_ids: TokenIds, num_tokens: int, cache_salt: str = "") -> Allocation:
        """See `KVBackendProtocol.allocate`."""
        size = self.layout.block_size_tokens
        reusable = token_ids[: max(0, (len(token_ids) - 1) // size) * size]
        hashes = block_hashes(reusable, size, root_hash(self.layout, cache_salt))
        with self._lock:
            self._expire_pins()
            hits = self._leading(hashes, reusable)
            self._take(hits)
            try:
                fresh = self._take_fresh(num_tokens, len(hits))
            except KvExhausted:
                self._drop(self._blocks_of(hits))
                raise
            return self._hand_out([*self._blocks_of(hits), *fresh], len(hits))

    def share(self, allocation: Allocation) -> Allocation:
        """See `KVBackendProtocol.share`."""
        with self._lock:
            if id(allocation) not in self._held:
                raise ValueError("the allocation was freed before: its blocks may be somebody else's")
            self._refs[allocation.block_ids] += 1
            shared = self._hand_out(allocation.block_ids.tolist(), allocation.num_shared_blocks)
            shared.num_cached_tokens = allocation.num_cached_tokens
            return shared

    def free(self, allocation: Allocation) -> None:
        """Drops the references. Idempotent."""
        with self._lock:
            if self._held.pop(id(allocation), None) is not None:
                block_ids = allocation.block_ids.tolist()
                self._drop(block_ids)
                if id(allocation) in self._copied:
                    self._copied.remove(id(allocation))
                    return
                self._eviction.access([self._hash_of[b] for b in block_ids if b in self._hash_of])

    def extend(self, allocation: Allocation, num_tokens: int) -> None:
        """Adds fresh blocks up to enough for num_tokens tokens in all. Raises KvExhausted, having taken nothing."""
        with self._lock:
            fresh = self._take_fresh(num_tokens, len(allocation.block_ids))
            allocation.block_ids = np.concatenate([allocation.block_ids, np.array(fresh, dtype=np.int32)])

    def publish(self, allocation: Allocation, token_ids: TokenIds, cache_salt: str = "") -> None:
        """The blocks hold KV of these tokens: the full ones are found from now on. Copies of stored ones stay private.

        The allocation keeps its references, and must not write its full blocks any more.
        """
        size, packed = self.layout.block_size_tokens, pack_int32(token_ids)
        hashes = block_hashes(token_ids, size, root_hash(self.layout, cache_salt))
        with self._lock:
            stored = []
            for n, (block_hash, block_id) in enumerate(zip(hashes, allocation.block_ids.tolist(), strict=False)):
                if block_hash in self._stored or block_id in self._hash_of:
                    continue
                self._stored[block_hash] = _Stored(block_id, _token_bytes(packed, n, size))
                self._hash_of[block_id] = block_hash
                stored.append(block_hash)
            self.outcomes["stored"] += len(stored)
            if stored:
                self._tell(BlockEvent(stored=tuple(stored)))

    # ---- by hash ----

    def lookup(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes are stored."""
        with self._lock:
            for n, block_hash in enumerate(hashes):
                if block_hash not in self._stored:
                    return n
            return len(hashes)

    def holds(self, hashes: Sequence[BlockHash]) -> list[bool]:
        """Whether each is stored."""
        with self._lock:
            return [block_hash in self._stored for block_hash in hashes]

    def drop(self, hashes: Iterable[BlockHash]) -> None:
        """Those that nobody holds are stored no longer. Unknown ones are fine."""
        with self._lock:
            self._expire_pins()
            held = _Referenced(self._stored, self._refs)
            gone = [h for h in dict.fromkeys(hashes) if h in self._stored and h not in held]
            for block_hash in gone:
                self._eviction.remove(block_hash)
            self._forget(gone)

    def get(self, hashes: Sequence[BlockHash], token_ids: TokenIds) -> Allocation:
        """References on the leading blocks that are stored for exactly these tokens; an empty one for none.

        The caller gives it to `free`. Raises InvalidRequest when the tokens do not match the number of hashes.
        """
        self._check_tokens(hashes, token_ids)
        with self._lock:
            self._expire_pins()
            hits = self._leading(hashes, token_ids)
            self.outcomes["hit"] += len(hits)
            self.outcomes["missed"] += len(hashes) - len(hits)
            self._take(hits)
            return self._hand_out(self._blocks_of(hits), len(hits))

    def hold(self, hashes: Iterable[BlockHash]) -> tuple[list[BlockKey], Allocation]:
        """References on those of the blocks that are stored, and their keys. No use of them: for what copies them.

        The caller gives the allocation to `free`.
        """
        with self._lock:
            held = [block_hash for block_hash in dict.fromkeys(hashes) if block_hash in self._stored]
            self._take(held)
            keys = [BlockKey(h, self._stored[h].token_bytes, self._stored[h].parent) for h in held]
            allocation = self._hand_out(self._blocks_of(held), 0)
            self._copied.add(id(allocation))
            return keys, allocation

    def begin_put(self, hashes: Sequence[BlockHash], token_ids: TokenIds) -> PendingPut:
        """Blocks for the hashes that are neither stored nor being filled by another put.

        When memory is short only the first of them get one, for a block is of no use without those before it.
        Nobody sees the blocks before `commit_put`; `abort_put` gives them back. Raises InvalidRequest.
        """
        self._check_tokens(hashes, token_ids)
        return self.begin_put_of(keys_of(hashes, token_ids, self.layout.block_size_tokens))

    def begin_put_of(self, keys: Sequence[BlockKey]) -> PendingPut:
        """`begin_put` for blocks of whatever sequences."""
        with self._lock:
            self._expire_pins()
            present: list[BlockHash] = []
            absent: dict[BlockHash, int] = {}
            for n, key in enumerate(keys):
                if key.hash in self._stored:
                    present.append(key.hash)
                elif key.hash not in self._filling:
                    absent.setdefault(key.hash, n)
            # Referenced meanwhile, so that the put does not evict the blocks it builds on.
            self._take(present)
            block_ids = self._claim(len(absent))
            self._drop(self._blocks_of(present))
            self._refs[block_ids] = 1
            positions = list(absent.values())[: len(block_ids)]
            put = PendingPut(
                positions=np.array(positions, dtype=np.int32),
                keys=tuple(keys[n] for n in positions),
                allocation=self._hand_out(block_ids, 0),
                offered=tuple(dict.fromkeys(keys)),
                num_present=len(present),
            )
            self._filling.update(put.hashes)
            return put

    def commit_put(self, put: PendingPut, num_filled: int | None = None) -> None:
        """The blocks are filled, or the first `num_filled` of them: from now on these are found. Ends the put."""
        with self._lock:
            if not self._end_put(put):
                return
            block_ids = put.allocation.block_ids.tolist()
            filled = put.keys[:num_filled]
            for key, block_id in zip(filled, block_ids, strict=False):
                self._stored[key.hash] = _Stored(block_id, key.token_bytes, key.parent)
                self._hash_of[block_id] = key.hash
            self._drop(block_ids)
            for path in paths([key for key in put.offered if key.hash in self._stored]):
                self._eviction.access(path)
            self.outcomes["stored"] += len(filled)
            self._tell(BlockEvent(stored=tuple(key.hash for key in filled)))

    def abort_put(self, put: PendingPut) -> None:
        """The blocks were not filled. A no-op for a put that has ended."""
        with self._lock:
            if self._end_put(put):
                self._drop(put.allocation.block_ids.tolist())

    def pin(self, hashes: Iterable[BlockHash], ttl_s: float) -> int:
        """Keeps stored blocks from eviction for ttl_s (0: no longer); returns how many are pinned now."""
        with self._lock:
            self._expire_pins()
            known = [block_hash for block_hash in dict.fromkeys(hashes) if block_hash in self._stored]
            if ttl_s <= 0:
                self._unpin([block_hash for block_hash in known if block_hash in self._pins])
                return 0
            self._take([block_hash for block_hash in known if block_hash not in self._pins])
            self._pins.update(dict.fromkeys(known, self._clock.now() + ttl_s))
            return len(known)

    # ---- the lock is held from here on ----

    def _settle(self, layout: KvLayout) -> None:
        num_blocks = self._budget_bytes // layout.block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"kv_store.budget_bytes is {self._budget_bytes}, which holds no block of {layout.block_bytes} bytes"
            )
        memory = shared_memory.allocate(num_blocks * layout.block_bytes)
        self._region = KvRegion(memoryview(memory.arena), layout.block_bytes, num_blocks, descriptor=memory.descriptor)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = np.zeros(num_blocks, dtype=np.int32)
        self._eviction = make_eviction(self._eviction_name, num_blocks)
        self._layout = layout

    def _check_tokens(self, hashes: Sequence[BlockHash], token_ids: TokenIds) -> None:
        wanted = len(hashes) * self.layout.block_size_tokens
        if len(token_ids) != wanted:
            raise InvalidRequest(
                f"token_ids has {len(token_ids)} tokens, but {len(hashes)} block hashes stand for {wanted}"
            )

    def _leading(self, hashes: Sequence[BlockHash], token_ids: TokenIds) -> list[BlockHash]:
        """The hashes up to the first that is not stored, or that is stored for other tokens."""
        step, packed = self.layout.block_size_tokens, pack_int32(token_ids)
        for n, block_hash in enumerate(hashes):
            stored = self._stored.get(block_hash)
            if stored is None or stored.token_bytes != _token_bytes(packed, n, step):
                return list(hashes[:n])
        return list(hashes)

    def _blocks_of(self, hashes: Iterable[BlockHash]) -> list[int]:
        return [self._stored[block_hash].block_id for block_hash in hashes]

    def _take(self, hashes: Iterable[BlockHash]) -> None:
        """One reference more on each of these stored blocks."""
        for block_hash in hashes:
            block_id = self._stored[block_hash].block_id
            self._num_cached -= not self._refs[block_id]
            self._refs[block_id] += 1

    def _drop(self, block_ids: Sequence[int]) -> None:
        """One reference less on each block."""
        for block_id in block_ids:
            self._refs[block_id] -= 1
            if self._refs[block_id]:
                continue
            if block_id in self._hash_of:
                self._num_cached += 1
            else:
                self._free.append(block_id)

    def _take_fresh(self, num_tokens: int, num_present: int) -> list[int]:
        """Referenced blocks for num_tokens tokens beside those present. Raises KvExhausted, having taken nothing."""
        missing = max(0, -(-num_tokens // self.layout.block_size_tokens) - num_present)
        available = len(self._free) + self._num_cached
        if missing > available:
            raise KvExhausted(
                f"{num_tokens} tokens need {missing} more KV blocks; {available} of {len(self._refs)} are left: "
                f"try again, or raise {self._setting}",
                retry_after_s=0.1,
            )
        fresh = self._claim(missing)
        self._refs[fresh] = 1
        return fresh

    def _claim(self, wanted: int) -> list[int]:
        """Up to `wanted` unreferenced blocks, evicting stored ones where free ones run out."""
        short = wanted - len(self._free)
        if short > 0:
            self._forget(self._eviction.evict(short, _Referenced(self._stored, self._refs)))
        return [self._free.pop() for _ in range(min(wanted, len(self._free)))]

    def _forget(self, hashes: Sequence[BlockHash]) -> None:
        """Stored and unreferenced ones, which the policy knows no longer."""
        for block_hash in hashes:
            block_id = self._stored.pop(block_hash).block_id
            del self._hash_of[block_id]
            self._free.append(block_id)
        self._num_cached -= len(hashes)
        if hashes:
            self.outcomes["evicted"] += len(hashes)
            self._tell(BlockEvent(removed=tuple(hashes)))

    def _hand_out(self, block_ids: list[int], num_shared: int) -> Allocation:
        allocation = Allocation(
            np.array(block_ids, dtype=np.int32), num_shared * self.layout.block_size_tokens, num_shared
        )
        self._held[id(allocation)] = allocation
        return allocation

    def _end_put(self, put: PendingPut) -> bool:
        if self._held.pop(id(put.allocation), None) is None:
            return False
        self._filling.difference_update(put.hashes)
        return True

    def _expire_pins(self) -> None:
        if self._pins:
            now = self._clock.now()
            self._unpin([block_hash for block_hash, until_s in self._pins.items() if until_s <= now])

    def _unpin(self, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            del self._pins[block_hash]
        self._drop(self._blocks_of(hashes))

    def _tell(self, event: BlockEvent) -> None:
        for callback in self._watchers:
            callback(event)


def _token_bytes(packed: bytes, block: int, block_size_tokens: int) -> bytes:
    return packed[4 * block * block_size_tokens : 4 * (block + 1) * block_size_tokens]
