"""Where KV blocks live: what every pool of KV memory implements (LMDeploy's cache, host memory)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sagellm_common.core.kv import Allocation, BlockEvent, KvMemory
from sagellm_common.core.types import BlockHash, KvLayout, KvStats, TokenIds


class KVBackendProtocol(Protocol):
    """A pool of KV blocks. All methods are thread-safe and short (they never wait for the engine's compute)."""

    @property
    def layout(self) -> KvLayout: ...

    def allocate(self, token_ids: TokenIds, num_tokens: int, cache_salt: str = "") -> Allocation:
        """Blocks for `num_tokens` tokens, their leading ones shared with the prefix cache where it holds them.

        A cache hit is verified against `token_ids` and never covers all of them: at least one token is left to
        compute. Raises KvExhausted, having taken nothing.
        """

    def share(self, allocation: Allocation) -> Allocation:
        """References of its own on the blocks of an allocation that is still held: each is freed by itself."""

    def free(self, allocation: Allocation) -> None:
        """Drops the references. Idempotent."""

    def cached_hashes(self) -> list[BlockHash]:
        """Hashes of all blocks of the prefix cache (a snapshot for a new watcher)."""

    def watch(self, callback: Callable[[BlockEvent], None]) -> None:
        """Calls back on each change of the prefix cache, from whatever thread made it."""

    def get_utilization(self) -> KvStats: ...

    def regions(self) -> KvMemory: ...

    @property
    def eviction(self) -> str:
        """Name of the policy that says which unused blocks of the prefix cache go first."""

    def set_eviction(self, name: str) -> None:
        """Another policy from now on; what is cached stays. Raises ConfigError, having changed nothing."""
