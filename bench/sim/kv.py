"""One simulated worker's KV memory: a prefix cache under the production eviction policy, beside what runs."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_common.kv_policy.eviction import make_eviction


class SimKv:
    """Counted in blocks of `block_tokens`. What runs is not shared with the cache: a bound, never too good."""

    def __init__(self, capacity_blocks: int, block_tokens: int, eviction: str) -> None:
        self.capacity_blocks = capacity_blocks
        self.block_tokens = block_tokens
        self.running_blocks = 0
        self._cached: set[int] = set()
        self._policy = make_eviction(eviction, capacity_blocks)

    @property
    def free_tokens(self) -> int:
        """What could be taken for running sequences, all of the cache given up."""
        return (self.capacity_blocks - self.running_blocks) * self.block_tokens

    def has_room(self, tokens: int) -> bool:
        """For one more sequence."""
        return self.blocks_of(tokens) * self.block_tokens <= self.free_tokens

    def hit_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Leading prompt tokens found in the cache; at least one is left to compute."""
        depth = 0
        while depth < len(blocks) and blocks[depth] in self._cached:
            depth += 1
        return min(depth * self.block_tokens, prompt_tokens - 1)

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, blocks: int) -> list[int]:
        """Memory for what runs; returns the cached blocks that had to go."""
        self.running_blocks += blocks
        return self._shrink()

    def give_back(self, blocks: int) -> None:
        self.running_blocks -= blocks

    def cache(self, blocks: Sequence[int]) -> list[int]:
        """Full blocks whose KV is there now; returns those that had to go."""
        self._cached.update(blocks)
        self._policy.access(blocks)
        return self._shrink()

    def _shrink(self) -> list[int]:
        over = len(self._cached) + self.running_blocks - self.capacity_blocks
        gone: list[int] = self._policy.evict(over) if over > 0 else []
        self._cached.difference_update(gone)
        return gone
