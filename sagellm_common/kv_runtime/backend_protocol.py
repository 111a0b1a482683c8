"""Where KV blocks live: what every pool of KV memory implements (LMDeploy's cache, host memory)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sagellm_common.core.kv import Allocation, BlockEvent, BlockInfo, BlockMoves, KvFragmentation, KvMemory
from sagellm_common.core.types import BlockHash, BlockIds, KvLayout, KvStats, TokenIds
from sagellm_common.kv_policy.eviction import Cost


class KVBackendProtocol(Protocol):
    """A pool of KV blocks. All methods are thread-safe and short (they never wait for the engine's compute)."""

    @property
    def layout(self) -> KvLayout: ...

    def allocate(self, token_ids: TokenIds, num_tokens: int, cache_salt: str = "", tenant: str = "") -> Allocation:
        """Blocks for `num_tokens` tokens, their leading ones shared with the prefix cache where it holds them.

        A cache hit is verified against `token_ids` and never covers all of them: at least one token is left to
        compute. Fresh blocks are charged to `tenant`. Raises KvExhausted and TenantQuota, having taken nothing.
        """

    def bring_back(self, allocation: Allocation, token_ids: TokenIds, cache_salt: str = "") -> int:
        """Fills blocks with the tokens after the cached ones, out of slower memory below the pool: as `allocate` has
        done, which stops after some milliseconds' worth (`Allocation.more_below`). So does this.

        Returns the number of tokens gained. Takes milliseconds, on any thread; the allocation may be freed meanwhile,
        but not used.
        """

    def lend(self, token_ids: TokenIds, cache_salt: str = "") -> Allocation:
        """References on the leading blocks that the prefix cache holds of these tokens, for others to copy: no use of
        them, and nothing fresh. Verified as in `allocate`, but all of the tokens may be covered; empty for none.
        """

    def share(self, allocation: Allocation) -> Allocation:
        """References of its own on the blocks of an allocation that is still held: each is freed by itself."""

    def free(self, allocation: Allocation) -> None:
        """Drops the references. Idempotent."""

    def extend(self, allocation: Allocation, num_tokens: int) -> None:
        """Adds fresh blocks up to enough for num_tokens tokens in all. Raises as `allocate` does, having added none."""

    def make_writable(self, allocation: Allocation, begin_token: int) -> int:
        """Copy on write: the blocks that hold tokens from begin_token on are this holder's alone afterwards.

        To be called before a holder of shared blocks writes into them, as two sequences that go on from one partial
        block do. The pool copies, before it returns; `block_ids` has the copies. Returns how many there are. Raises as
        `allocate` does, having changed nothing.
        """

    def cached_hashes(self) -> list[BlockHash]:
        """Hashes of all blocks of the prefix cache (a snapshot for a new watcher)."""

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Calls back on each change of the prefix cache, from whatever thread made it."""

    def get_utilization(self) -> KvStats: ...

    def get_block_info(self, block_ids: BlockIds) -> list[BlockInfo]:
        """Who has these blocks of memory, in order. Raises IndexError outside the pool."""

    def migrate(self, plan: BlockMoves) -> int:
        """Moves blocks within the memory, bytes and all; every table and the cache find them in the new place.

        Those that cannot be moved (any more) stay: pinned ones, and those whose destination somebody holds. Returns how
        many were moved. Copies under the pool's lock: a plan is to be small.
        """

    def get_fragmentation(self) -> KvFragmentation: ...

    def regions(self) -> KvMemory: ...

    @property
    def eviction(self) -> str:
        """Name of the policy that says which unused blocks of the prefix cache go first."""

    def price(self, cost: Cost) -> None:
        """What blocks cost from now on, for eviction policies that mind it: those that come, as they come. Called with
        the pool's lock held, for each block; it must be quick."""

    def set_eviction(self, name: str) -> None:
        """Another policy from now on; what is cached stays. Raises ConfigError, having changed nothing."""
