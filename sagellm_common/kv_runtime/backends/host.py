"""KV blocks in host memory, found by the hash of their content: the pool of kv_store.

absent ──begin_put──► filling ──commit_put──► stored ──evicted──► absent
  ▲                      │ abort_put
  └──────────────────────┘
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sagellm_common.core import shared_memory
from sagellm_common.core.clock import Clock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import ConfigError, InvalidRequest, LayoutMismatch
from sagellm_common.core.kv import BlockEvent, KvRegion
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvStats, TokenIds
from sagellm_common.kv_runtime.pool import KVPool, PoolAllocation, Table
from sagellm_common.kv_runtime.tiers import BlockKey, keys_of


@dataclass(frozen=True, slots=True, eq=False)
class PendingPut:
    """Blocks to be filled: allocation.block_ids[i] is for the put's hash number positions[i] of `path`."""

    positions: BlockIds
    keys: tuple[BlockKey, ...]
    allocation: PoolAllocation
    path: tuple[BlockHash, ...]
    num_present: int
    """How many of the put's hashes are stored already."""

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        return tuple(key.hash for key in self.keys)


class HostKvPool(KVPool):
    """A `KVPool` in memory of the host, and content-addressed puts and gets beside it. Thread-safe.

    The pool takes the first layout it is given, with budget_bytes of memory that the system provides as it is
    touched; another layout is refused with LayoutMismatch from then on. `setting` is what gives it more.
    """

    def __init__(
        self,
        budget_bytes: int,
        clock: Clock,
        layout: KvLayout | None = None,
        setting: str = "kv_store.budget_bytes",
        eviction: str = "lru",
        *,
        tenants: Mapping[str, TenantConfig] | None = None,
    ) -> None:
        super().__init__(eviction=eviction, tenants=tenants, clock=clock, setting=setting)
        self._budget_bytes = budget_bytes
        self._filling: set[BlockHash] = set()
        self._pins: dict[BlockHash, float] = {}
        self.outcomes: Counter[str] = Counter()
        """Blocks that were stored, evicted, hit and missed; for telemetry."""
        self.watch(self._count)
        if layout is not None:
            self.adopt(layout)

    # ---- what there is ----

    def adopt(self, layout: KvLayout) -> None:
        """Settles the layout or checks it. Raises LayoutMismatch, ConfigError when not one block fits the budget."""
        with self.lock:
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
        assert isinstance(self._memory, KvRegion)
        return self._memory

    def get_utilization(self) -> KvStats:
        with self.lock:
            self._expire_pins()
            return super().get_utilization()

    # ---- by hash ----

    def lookup(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes are stored."""
        with self.lock:
            return self.cache.leading(hashes)

    def holds(self, hashes: Sequence[BlockHash]) -> list[bool]:
        """Whether each is stored."""
        with self.lock:
            return [key in self.cache for key in hashes]

    def drop(self, hashes: Iterable[BlockHash]) -> None:
        """Those that nobody holds are stored no longer. Unknown ones are fine."""
        with self.lock:
            self._expire_pins()
            self.cache.remove([key for key in hashes if self.cache.idle(key)])

    def get(self, hashes: Sequence[BlockHash], token_ids: TokenIds, contexts: Sequence[bytes] = ()) -> PoolAllocation:
        """References on the leading blocks that are stored for exactly these tokens; an empty one for none.

        `contexts` are the blocks' (`prefix_reuse.matcher`), one for each, where the caller has them. It gives the
        allocation to `free`. Raises InvalidRequest when the tokens do not match the number of hashes.
        """
        self._check_tokens(hashes, token_ids)
        with self.lock:
            self._expire_pins()
            hits = self.cache.find(hashes, token_ids, known=contexts)
            self.outcomes["hit"] += len(hits)
            self.outcomes["missed"] += len(hashes) - len(hits)
            return self._hand_out(hits, len(hits) * self.layout.block_size_tokens, len(hits))

    def hold(self, hashes: Iterable[BlockHash]) -> tuple[list[BlockKey], PoolAllocation]:
        """References on those of the blocks that are stored, and their keys. No use of them: for what copies them.

        The caller gives the allocation to `free`.
        """
        with self.lock:
            held = [key for key in dict.fromkeys(hashes) if key in self.cache]
            return [self.cache[key].key for key in held], self.hold_to_read(self.cache.blocks_of(held))

    def begin_put(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        tenant: str = "",
        contexts: Sequence[bytes] = (),
        depths: Sequence[int] = (),
    ) -> PendingPut:
        """Blocks for the hashes that are neither stored nor being filled by another put.

        When memory, or the tenant's share of it, is short only the first of them get one, for a block is of no use
        without those before it. `contexts` and `depths` are the blocks', as in `BlockKey`. Nobody sees them before
        `commit_put`; `abort_put` gives them back. Raises InvalidRequest.
        """
        self._check_tokens(hashes, token_ids)
        size = self.layout.block_size_tokens
        return self.begin_put_of(keys_of(hashes, token_ids, size, known=contexts, depths=depths), tenant)

    def begin_put_of(self, keys: Sequence[BlockKey], tenant: str = "") -> PendingPut:
        """`begin_put` for blocks of whatever sequences."""
        with self.lock:
            self._expire_pins()
            account = self.quota.account_of(tenant)
            present = [key.hash for key in keys if key.hash in self.cache]
            absent: dict[BlockHash, int] = {}
            for n, key in enumerate(keys):
                if key.hash not in self.cache and key.hash not in self._filling:
                    absent.setdefault(key.hash, n)
            # Referenced meanwhile, so that the put does not evict the blocks it builds on.
            built_on = self.cache.blocks_of(dict.fromkeys(present))
            self.blocks.hold(built_on)
            possible, evictions = self._room(len(absent), account, headroom=0)
            self._evict(evictions)
            table = self.blocks.allocate(max(0, min(possible, self.blocks.num_free)), account)
            self.cache.release(built_on, used=False)
            positions = list(absent.values())[: len(table)]
            put = PendingPut(
                positions=np.array(positions, np.int32),
                keys=tuple(keys[n] for n in positions),
                allocation=self._hand_out(table, len(table) * self.layout.block_size_tokens, 0, account=account),
                path=tuple(dict.fromkeys(key.hash for key in keys)),
                num_present=len(present),
            )
            self._filling.update(put.hashes)
            return put

    def commit_put(self, put: PendingPut, num_filled: int | None = None) -> None:
        """The blocks are filled, or the first `num_filled` of them: from now on these are found. Ends the put."""
        with self.lock:
            if not put.allocation.live:
                return
            filled = put.keys[:num_filled]
            self.cache.insert(filled, put.allocation.table[: len(filled)])
            put.allocation.uses = False
            self.abort_put(put)
            self.cache.use(put.path)

    def abort_put(self, put: PendingPut) -> None:
        """The blocks were not filled. A no-op for a put that has ended."""
        with self.lock:
            if put.allocation.live:
                self._filling.difference_update(put.hashes)
                self.free(put.allocation)

    def pin(self, hashes: Iterable[BlockHash], ttl_s: float, most_blocks: int | None = None) -> int:
        """Keeps stored blocks from eviction for ttl_s (0: no longer); returns how many of these are pinned now: the
        first, where more than `most_blocks` would be in all (None: any number)."""
        with self.lock:
            self._expire_pins()
            known = [key for key in dict.fromkeys(hashes) if key in self.cache]
            if ttl_s <= 0:
                self._unpin([key for key in known if key in self._pins])
                return 0
            if most_blocks is not None:
                places = itertools.count(most_blocks - len(self._pins), -1)
                known = list(itertools.takewhile(lambda key: key in self._pins or next(places) > 0, known))
            self.blocks.hold(self.cache.blocks_of(key for key in known if key not in self._pins))
            self._pins.update(dict.fromkeys(known, self._clock.now() + ttl_s))
            return len(known)

    # ---- the lock is held from here on ----

    def tables(self) -> Iterator[Table]:
        yield from super().tables()
        for key in self._pins:
            yield Table(self.cache.blocks_of([key]), self.layout.block_size_tokens, pinned=False)

    def _make_room(self, count: int, account: int) -> None:
        self._expire_pins()
        super()._make_room(count, account)

    def _settle(self, layout: KvLayout) -> None:
        num_blocks = self._budget_bytes // layout.block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"{self._setting} is {self._budget_bytes}, which holds no block of {layout.block_bytes} bytes: raise it"
            )
        memory = shared_memory.allocate(num_blocks * layout.block_bytes)
        region = KvRegion(memoryview(memory.arena), layout.block_bytes, num_blocks, descriptor=memory.descriptor)
        self.open(layout, region)

    def _check_tokens(self, hashes: Sequence[BlockHash], token_ids: TokenIds) -> None:
        wanted = len(hashes) * self.layout.block_size_tokens
        if len(token_ids) != wanted:
            raise InvalidRequest(
                f"token_ids has {len(token_ids)} tokens, but {len(hashes)} block hashes stand for {wanted}"
            )

    def _expire_pins(self) -> None:
        if self._pins:
            now = self._clock.now()
            self._unpin([key for key, until_s in self._pins.items() if until_s <= now])

    def _unpin(self, hashes: Sequence[BlockHash]) -> None:
        for key in hashes:
            del self._pins[key]
        self.cache.release(self.cache.blocks_of(hashes), used=False)

    def _count(self, event: BlockEvent) -> None:
        self.outcomes["stored"] += len(event.stored)
        self.outcomes["evicted"] += len(event.removed)
