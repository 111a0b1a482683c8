"""What a block is worth: cost to compute it again ÷ size × how likely, and how soon, it is used again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic

from sagellm_common.kv_policy.eviction.base import K
from sagellm_common.kv_policy.lifetime import BlockClass, LifetimePredictor

GHOSTS_PER_BLOCK = 8
MIN_GHOSTS = 1 << 14
"""Blocks given up are remembered, so that a small pool, too, learns when its blocks would have been used."""
MIN_LESSON = 512


@dataclass(slots=True, eq=False)
class _Block(Generic[K]):
    key: K
    cost: float
    block_class: BlockClass = ()
    used_at: int = 0
    parent: _Block[K] | None = None
    children: int = 0
    """Held ones: while there are some the block stays, for without it they are of no use."""
    passed_over: bool = False
    """It was to go and had children. It stands in no queue, and goes after them."""


class CostAware(Generic[K]):
    """Gives up the block with the least (uses per time held, as `LifetimePredictor` has learned) x cost(depth).

    Blocks of one class and, to a factor of two, one cost stand in a queue, least recently used first; a victim is the
    least worthy of the queues' heads. `cost` is what it takes to compute the block with this number in its path again,
    over its size, more than 0; with the default each hit counts the same.
    """

    def __init__(self, capacity_blocks: int, cost: Callable[[int], float] = lambda depth: 1.0) -> None:
        self.lifetimes = LifetimePredictor()
        self._cost = cost
        self._max_ghosts = max(MIN_GHOSTS, GHOSTS_PER_BLOCK * capacity_blocks)
        self._now = 0
        """In block accesses."""
        self._next_lesson = MIN_LESSON
        self._blocks: dict[K, _Block[K]] = {}
        self._queues: dict[tuple[BlockClass, int], OrderedDict[K, _Block[K]]] = {}
        """All blocks but those that were to go and had children."""
        self._ghosts: OrderedDict[K, tuple[BlockClass, int]] = OrderedDict()

    def access(self, path: Sequence[K]) -> None:
        blocks, parent = [], None
        for depth, key in enumerate(path):
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _Block(key, self._cost(depth))
            if parent is not None and block.parent is not parent:
                block.parent = parent
                parent.children += 1
            blocks.append(block)
            parent = block
        for from_end, block in enumerate(reversed(blocks), start=1):
            self._now += 1
            self._use(block, from_end)
        if self._now >= self._next_lesson:
            self._learn()

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        gone: list[K] = []
        kept: list[_Block[K]] = []
        worth = {name: self._worth(queue) for name, queue in self._queues.items() if queue}
        while worth and len(gone) < count:
            worst = min(worth, key=worth.__getitem__)
            queue = self._queues[worst]
            key, block = queue.popitem(last=False)
            if key in keep:
                kept.append(block)
            elif block.children:
                block.passed_over = True
            else:
                gone.append(key)
                if freed := self._give_up(block):
                    worth[_queue_of(freed)] = self._worth(self._queues[_queue_of(freed)])
            if queue:
                worth[worst] = self._worth(queue)
            else:
                worth.pop(worst, None)
        for block in reversed(kept):
            self._to_front(block)
        while len(self._ghosts) > self._max_ghosts:
            _, (block_class, used_at) = self._ghosts.popitem(last=False)
            self.lifetimes.observe(block_class, self._now - used_at, used=False)
        return gone

    def remove(self, key: K) -> None:
        block = self._blocks.get(key)
        if block is not None:
            self._queues[_queue_of(block)].pop(key, None)
            self._give_up(block)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[K]:
        return iter(sorted(self._blocks, key=lambda key: self._blocks[key].used_at))

    def _use(self, block: _Block[K], from_end: int) -> None:
        idle = 0
        if block.used_at:
            idle = self._now - block.used_at
            self.lifetimes.observe(block.block_class, idle, used=True)
            self._queues[_queue_of(block)].pop(block.key, None)
            block.passed_over = False
        elif ghost := self._ghosts.pop(block.key, None):
            block_class, used_at = ghost
            idle = self._now - used_at
            self.lifetimes.observe(block_class, idle, used=True)
        block.used_at = self._now
        block.block_class = _class_of(idle, from_end)
        self._queues.setdefault(_queue_of(block), OrderedDict())[block.key] = block

    def _give_up(self, block: _Block[K]) -> _Block[K] | None:
        """Returns its parent, if that waited for this, its last child, and is the next of its queue now."""
        del self._blocks[block.key]
        self._ghosts[block.key] = (block.block_class, block.used_at)
        block.passed_over = False
        parent = block.parent
        if parent is None:
            return None
        parent.children -= 1
        if parent.children or not parent.passed_over:
            return None
        self._to_front(parent)
        return parent

    def _to_front(self, block: _Block[K]) -> None:
        queue = self._queues[_queue_of(block)]
        queue[block.key] = block
        queue.move_to_end(block.key, last=False)
        block.passed_over = False

    def _worth(self, queue: OrderedDict[K, _Block[K]]) -> float:
        block = next(iter(queue.values()))
        return self.lifetimes.value(block.block_class, self._now - block.used_at) * block.cost

    def _learn(self) -> None:
        self._next_lesson = self._now + max(MIN_LESSON, (len(self._blocks) + len(self._ghosts)) // 4)
        held = ((block.block_class, self._now - block.used_at) for block in self._blocks.values())
        given_up = ((block_class, self._now - used_at) for block_class, used_at in self._ghosts.values())
        self.lifetimes.refresh(chain(held, given_up))


def _queue_of(block: _Block[K]) -> tuple[BlockClass, int]:
    return block.block_class, math.frexp(block.cost)[1]


def _class_of(idle: int, from_end: int) -> BlockClass:
    """How long the block lay idle before this use (0: its first), and whether it ends its path: what a sequence ends
    with seldom begins another one."""
    return (idle.bit_length() // 2, min(from_end, 3))
