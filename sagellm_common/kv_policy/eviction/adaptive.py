"""The best of several orders, whichever it is at present: each is tried on a sample of the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic

from sagellm_common.kv_policy.eviction.base import Cost, K, uniform
from sagellm_common.kv_policy.eviction.cost_aware import Block, CostAware, Heads

SHADOW_BLOCKS = 256
MAX_RATE = 0.25
"""A shadow has as many blocks as it needs to tell, of no more than this part of the keys: time is the limit."""
FADE = 0.9
"""What the hits before the last lesson count for."""
CERTAINTY = 2.0
"""Standard deviations by which another order must lead: documents hit as a whole or not at all, so luck is large."""
HOME = "learned"
_ABOVE = 1e15
"""More than there are accesses."""
_MIX, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


class Adaptive(CostAware[K]):
    """`CostAware`, which takes to another order where that surely hits more.

        learned   by what class, age and cost make a block worth
        recency   least recently used first
        again     those used once first; of equals the least recently used
        uses      by the power of two of the number of uses; of equals the least recently used

    Each order rules a shadow: a cache without content for the blocks whose hash falls into a sample, as much smaller as
    the sample is (miniature simulation: Waldspurger et al., USENIX ATC 2017; a choice among experts by what they would
    hit: LeCaR, HotStorage 2018).
    """

    def __init__(self, capacity_blocks: int, cost: Cost = uniform) -> None:
        super().__init__(capacity_blocks, cost)
        rate = min(MAX_RATE, SHADOW_BLOCKS / max(1, capacity_blocks))
        self._sampled = int(rate * (_MASK + 1))
        self._orders: dict[str, Callable[[Block[K]], float]] = {
            HOME: self._learned,
            "recency": lambda block: block.used_at,
            "again": lambda block: block.used_at + (block.uses > 1) * _ABOVE,
            "uses": lambda block: block.used_at + block.uses.bit_length() * _ABOVE,
        }
        shadow_blocks = max(1, round(rate * capacity_blocks))
        self._shadows = {name: Shadow(shadow_blocks, capacity_blocks, self._heads_of(name)) for name in self._orders}
        self.order = HOME

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        super().access(path, depth)
        sample = [self._blocks[key] for key in path if hash(key) * _MIX & _MASK < self._sampled]
        if sample:
            for shadow in self._shadows.values():
                shadow.access(sample)

    def _learn(self) -> None:
        super()._learn()
        best, most = HOME, 0.0
        for name, shadow in self._shadows.items():
            lead = shadow.hits - self._shadows[HOME].hits
            shadow.lead = FADE * shadow.lead + lead
            shadow.spread = FADE**2 * shadow.spread + lead**2
            if shadow.lead > max(most, CERTAINTY * math.sqrt(shadow.spread)):
                best, most = name, shadow.lead
        for shadow in self._shadows.values():
            shadow.hits = 0.0
        if best != self.order:
            self.order = best
            self._queue_anew(self._heads_of(best))

    def _heads_of(self, order: str) -> Heads[K]:
        return Heads(self._orders[order], by_uses=order == "uses", ages=order == HOME)


class Shadow(Generic[K]):
    """Counts, at what they cost, the hits of a cache of `capacity_blocks` that gives up the least worthy. It stands for
    one of `full_blocks`."""

    def __init__(self, capacity_blocks: int, full_blocks: int, heads: Heads[K]) -> None:
        self.hits = 0.0
        self.lead = self.spread = 0.0
        """Over the order at home: the sum of past lessons, and of their squares."""
        self._capacity, self._full = capacity_blocks, full_blocks
        self._held: dict[K, Block[K]] = {}
        self._heads = heads

    def access(self, path: Sequence[Block[K]]) -> None:
        """The blocks as they are after this use."""
        for block in path:
            if block.key not in self._held:
                break
            self.hits += block.cost
        for block in reversed(path):
            mine = self._held.get(block.key)
            if mine is None:
                mine = self._held[block.key] = Block(block.key, block.cost)
            self._heads.take_out(mine)
            mine.block_class, mine.used_at, mine.uses = block.block_class, block.used_at, block.uses
            self._heads.add(mine)
        self._heads.refresh(path[0].used_at, self._full)
        while len(self._held) > self._capacity:
            victim = self._heads.pop()
            assert victim is not None
            del self._held[victim.key]
