"""What a block is worth: cost to compute it again ÷ size × how likely, and how soon, it is used again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic

from sagellm_common.kv_policy.eviction.base import K, Queueing
from sagellm_common.kv_policy.lifetime import BlockClass, LifetimePredictor

GHOSTS_PER_BLOCK = 8
MIN_GHOSTS = 1 << 14
"""Blocks given up are remembered, so that a small pool, too, learns when its blocks would have been used."""
MIN_LESSON = 512
WORTH_LASTS = 64
"""One in so many of the pool's blocks may be accessed before what the queues are worth is looked at again."""

_Queue = tuple[BlockClass, int]
"""Class, and power of two of the cost."""


@dataclass(slots=True, eq=False)
class _Block(Generic[K]):
    key: K
    cost: float
    block_class: BlockClass = ()
    used_at: int = 0
    parent: _Block[K] | None = None
    children: int = 0
    """Held ones: while there are some the block stays, for without it they are of no use."""

    @property
    def queue(self) -> _Queue:
        return self.block_class, math.frexp(self.cost)[1]


class CostAware(Queueing[K, Any]):
    """Gives up the block with the least (uses per time held, as `LifetimePredictor` has learned) x cost(depth).

    Blocks of one class and, to a factor of two, one cost stand in a queue, least recently used first; a victim is the
    least worthy of the queues' heads. `cost` is what it takes to compute the block with this number in its path again,
    over its size, more than 0; with the default each hit counts the same.
    """

    def __init__(self, capacity_blocks: int, cost: Callable[[int], float] = lambda depth: 1.0) -> None:
        super().__init__()
        self.lifetimes = LifetimePredictor()
        self._cost = cost
        self._max_ghosts = max(MIN_GHOSTS, GHOSTS_PER_BLOCK * capacity_blocks)
        self._now = 0
        """In block accesses."""
        self._next_lesson = MIN_LESSON
        self._blocks: dict[K, _Block[K]] = {}
        self._queues: dict[_Queue, OrderedDict[K, _Block[K]]] = {}
        """All blocks but those aside and those that wait."""
        self._waiting: dict[K, _Block[K]] = {}
        """They were to go and had children: they go after them."""
        self._worth: dict[_Queue, float] = {}
        """Of the queues' heads."""
        self._worth_until = 0
        self._ghosts: OrderedDict[K, tuple[BlockClass, int]] = OrderedDict()

    def access(self, path: Sequence[K]) -> None:
        self._return(path)
        blocks: list[_Block[K]] = []
        parent: _Block[K] | None = None
        for depth, key in enumerate(path):
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _Block(key, self._cost(depth))
            if parent is not None and block.parent is not parent:
                self._leave_parent(block)
                block.parent = parent
                parent.children += 1
            blocks.append(block)
            parent = block
        for from_end, block in enumerate(reversed(blocks), start=1):
            self._now += 1
            self._use(block, from_end)
        if self._now >= self._next_lesson:
            self._learn()

    def remove(self, key: K) -> None:
        block = self._blocks.get(key)
        if block is not None:
            self._take_out(block)
            self._aside.pop(key, None)
            self._give_up(key, block)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[K]:
        return iter(sorted(self._blocks, key=lambda key: self._blocks[key].used_at))

    def _victim(self) -> tuple[K, _Block[K]] | None:
        if self._now >= self._worth_until:
            self._worth = {name: self._worth_of(queue) for name, queue in self._queues.items() if queue}
            self._worth_until = self._now + 1 + len(self._blocks) // WORTH_LASTS
        while self._worth:
            worst = min(self._worth, key=self._worth.__getitem__)
            queue = self._queues[worst]
            block = queue.popitem(last=False)[1] if queue else None
            if queue:
                self._worth[worst] = self._worth_of(queue)
            else:
                del self._worth[worst]
            if block is not None and block.children:
                self._waiting[block.key] = block
            elif block is not None:
                return block.key, block
        # Their children are in use: they are not, and who asks needs room.
        return self._waiting.popitem() if self._waiting else None

    def _put_back(self, key: K, place: _Block[K]) -> None:
        self._now += 1
        place.used_at = self._now
        self._enqueue(place)

    def _give_up(self, key: K, place: _Block[K]) -> None:
        del self._blocks[key]
        self._ghosts[key] = (place.block_class, place.used_at)
        self._leave_parent(place)

    def _forget(self) -> None:
        while len(self._ghosts) > self._max_ghosts:
            _, (block_class, used_at) = self._ghosts.popitem(last=False)
            self.lifetimes.observe(block_class, self._now - used_at, used=False)

    def _use(self, block: _Block[K], from_end: int) -> None:
        idle = 0
        if block.used_at:
            idle = self._now - block.used_at
            self.lifetimes.observe(block.block_class, idle, used=True)
            self._take_out(block)
        elif ghost := self._ghosts.pop(block.key, None):
            block_class, used_at = ghost
            idle = self._now - used_at
            self.lifetimes.observe(block_class, idle, used=True)
        block.used_at = self._now
        block.block_class = _class_of(idle, from_end)
        self._enqueue(block)

    def _enqueue(self, block: _Block[K], *, first: bool = False) -> None:
        name = block.queue
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = OrderedDict()
        queue[block.key] = block
        if first:
            queue.move_to_end(block.key, last=False)
        if first or name not in self._worth:
            self._worth[name] = self._worth_of(queue)

    def _take_out(self, block: _Block[K]) -> None:
        """Of where it stands: in its queue, aside, or waiting for its children."""
        if self._waiting.pop(block.key, None) is None:
            self._queues[block.queue].pop(block.key, None)

    def _leave_parent(self, block: _Block[K]) -> None:
        parent, block.parent = block.parent, None
        if parent is not None:
            parent.children -= 1
            if not parent.children and parent.key in self._waiting:
                del self._waiting[parent.key]
                self._enqueue(parent, first=True)

    def _worth_of(self, queue: OrderedDict[K, _Block[K]]) -> float:
        block = next(iter(queue.values()))
        return self.lifetimes.value(block.block_class, self._now - block.used_at) * block.cost

    def _learn(self) -> None:
        self._next_lesson = self._now + max(MIN_LESSON, (len(self._blocks) + len(self._ghosts)) // 4)
        held = ((block.block_class, self._now - block.used_at) for block in self._blocks.values())
        given_up = ((block_class, self._now - used_at) for block_class, used_at in self._ghosts.values())
        self.lifetimes.refresh(chain(held, given_up))


def _class_of(idle: int, from_end: int) -> BlockClass:
    """How long the block lay idle before this use (0: its first), and whether it ends its path: what a sequence ends
    with seldom begins another one."""
    return (idle.bit_length() // 2, min(from_end, 3))
