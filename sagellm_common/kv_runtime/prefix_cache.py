"""Blocks found by the hash of their content: one more holder of blocks, and the one that lets go when memory is short.

    in a table ──insert──► in a table and here ──release──► here alone: the policy ranks it ──evict──► free
                                  ▲                                  │
                                  └────────────── find ──────────────┘

The policy hears of a sequence's blocks when the last who holds its end lets go of it, all of them as one path: one use,
whatever number of holders the request had on its way. Blocks in a table are not its concern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.types import BlockHash, TokenIds
from sagellm_common.kv_policy.eviction import EvictionPolicy
from sagellm_common.kv_runtime.block_manager import BlockArray, BlockManager
from sagellm_common.kv_runtime.tiers import BlockKey
from sagellm_common.prefix_reuse.matcher import PrefixMatcher


@dataclass(slots=True, eq=False)
class CachedBlock:
    block: int
    key: BlockKey
    ranked: bool = False
    """The policy knows it. It does once nobody else has held it."""
    digest: bytes = b""
    """Of its KV, once `integrity` has read it."""


class PrefixCache:
    """Block hash → block, with one reference on each. Guarded by its pool's lock; watchers are called under it.

    While not `enabled` it finds nothing and takes nothing in.
    """

    def __init__(
        self,
        blocks: BlockManager,
        block_size_tokens: int,
        policy: EvictionPolicy[BlockHash],
    ) -> None:
        self.book = blocks
        """Whose references it takes."""
        self.matcher = PrefixMatcher(block_size_tokens)
        self.policy = policy
        self._entries: dict[BlockHash, CachedBlock] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._cached = np.zeros(blocks.num_blocks, np.bool_)
        self.watchers: list[Callable[[BlockEvent], None]] = []
        self.evicting: Callable[[list[BlockKey], BlockArray], None] = lambda keys, blocks: None
        """Called with what is evicted, before anybody else gets its blocks."""
        self.enabled = True

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._entries

    def __getitem__(self, block_hash: BlockHash) -> CachedBlock:
        return self._entries[block_hash]

    def hashes(self) -> list[BlockHash]:
        return list(self._entries)

    def blocks(self) -> BlockArray:
        """Each of them once, in order."""
        return np.flatnonzero(self._cached)

    def blocks_of(self, hashes: Iterable[BlockHash]) -> BlockArray:
        return np.array([self._entries[block_hash].block for block_hash in hashes], np.int64)

    def hash_of(self, block: int) -> BlockHash | None:
        return self._hash_of.get(block)

    def leading(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the first hashes are here."""
        return next((n for n, block_hash in enumerate(hashes) if block_hash not in self._entries), len(hashes))

    def find(
        self, hashes: Sequence[BlockHash], token_ids: TokenIds, root: BlockHash = b"", known: Sequence[bytes] = ()
    ) -> BlockArray:
        """A reference on each of the leading blocks that are here for exactly these tokens; see `PrefixMatcher`."""
        found = self.matcher.verify(hashes, token_ids, self.key, root, known) if self.enabled else []
        blocks = self.blocks_of(key.hash for key in found)
        self.book.hold(blocks)
        return blocks

    def key(self, block_hash: BlockHash) -> BlockKey | None:
        """Of the block that is here under this name."""
        entry = self._entries.get(block_hash)
        return entry.key if entry else None

    def insert(self, keys: Sequence[BlockKey], blocks: BlockArray) -> None:
        """blocks[i], which the caller holds, has the KV of keys[i]: it can be matched from now on.

        What is here already stays as it is, and the caller's copy of it private.
        """
        stored, depths = [], []
        for key, block in zip(keys, blocks.tolist(), strict=True) if self.enabled else ():
            if key.hash not in self._entries and not self._cached[block]:
                self._entries[key.hash] = CachedBlock(block, key)
                self._hash_of[block] = key.hash
                self._cached[block] = True
                stored.append(key.hash)
                depths.append(key.depth)
        self.book.hold(self.blocks_of(stored))
        self._tell(BlockEvent(stored=tuple(stored), depths=tuple(depths)))

    def release(self, table: BlockArray, *, used: bool = True) -> None:
        """Drops a holder's references on these blocks, in token order. `used` False: it has only copied them, or has
        not got to use them."""
        self.book.release(table)
        path = [self._hash_of[block] for block in table[self._cached[table]].tolist()]
        idle = [key for key in path if self.book.ref_counts[self._entries[key].block] == 1]
        if used and idle and idle[-1] == path[-1]:
            self._rank(path)
        else:
            self._rank([key for key in idle if not self._entries[key].ranked])

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """A sequence of these blocks was used: those of them that are here."""
        self._rank([key for key in hashes if key in self._entries])

    def idle_by_account(self, num_accounts: int) -> NDArray[np.int64]:
        """How many blocks nobody else holds, by the account they are charged to. O(blocks of the pool)."""
        accounts = self.book.accounts[self._cached & (self.book.ref_counts == 1)]
        return np.bincount(accounts, minlength=num_accounts)

    def evict(self, count: int, account: int | None = None) -> int:
        """Lets go of up to `count` blocks that nobody else holds, of this account or of any; returns of how many."""
        gone = self.policy.evict(count, _Kept(self._entries, self.book, account)) if count > 0 else []
        if gone:
            self.evicting([self._entries[block_hash].key for block_hash in gone], self.blocks_of(gone))
        self._drop(gone)
        return len(gone)

    def remove(self, hashes: Iterable[BlockHash]) -> None:
        """They are not found any more, whoever holds their blocks. Unknown ones are fine."""
        gone = [block_hash for block_hash in dict.fromkeys(hashes) if block_hash in self._entries]
        for block_hash in gone:
            self.policy.remove(block_hash)
        self._drop(gone)

    def idle(self, block_hash: BlockHash) -> bool:
        """Whether it is here and nobody else holds its block."""
        return block_hash in self._entries and self.book.ref_counts[self._entries[block_hash].block] == 1

    def _rank(self, path: Sequence[BlockHash]) -> None:
        if path:
            for block_hash in path:
                self._entries[block_hash].ranked = True
            self.policy.access(path, self._entries[path[0]].key.depth)

    def _drop(self, hashes: Sequence[BlockHash]) -> None:
        blocks = self.blocks_of(hashes)
        for block_hash, block in zip(hashes, blocks.tolist(), strict=True):
            del self._entries[block_hash], self._hash_of[block]
        self._cached[blocks] = False
        self.book.release(blocks)
        self._tell(BlockEvent(removed=tuple(hashes)))

    def _tell(self, event: BlockEvent) -> None:
        if event.stored or event.removed:
            for callback in self.watchers:
                callback(event)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The hashes that are not to be evicted: somebody holds their block, or it is on another account."""

    entries: dict[BlockHash, CachedBlock]
    blocks: BlockManager
    account: int | None

    def __contains__(self, block_hash: Any) -> bool:
        block = self.entries[block_hash].block
        if self.account is not None and self.blocks.accounts[block] != self.account:
            return True
        return bool(self.blocks.ref_counts[block] > 1)
