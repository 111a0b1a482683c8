"""What a block is worth: cost to compute it again ÷ size × how likely, and how soon, it is used again."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Generic

from sagellm_common.kv_policy.eviction.base import Cost, K, Queueing, uniform
from sagellm_common.kv_policy.lifetime import BlockClass, LifetimePredictor

GHOSTS_PER_BLOCK = 8
MIN_GHOSTS = 1 << 14
"""Blocks given up are remembered, so that a small pool, too, learns when its blocks would have been used."""
MIN_LESSON = 512
MAX_USES, MAX_FROM_END = 3, 3
"""Beyond these blocks are of one class. The fewer classes, the sooner there is something to be known of each."""


class _Queue(OrderedDict[K, "Block[K]"]):
    """Least recently used first. `entry` numbers its entry in the heap; older ones are void."""

    entry = 0


class Block(Generic[K]):
    """As a policy sees it."""

    __slots__ = ("block_class", "children", "cost", "key", "parent", "queue", "used_at", "uses")

    def __init__(self, key: K, cost: float) -> None:
        self.key = key
        self.cost = cost
        self.block_class: BlockClass = ()
        self.used_at = 0
        self.uses = 1
        self.parent: Block[K] | None = None
        self.children = 0
        """Held ones: while there are some the block stays, for without it they are of no use."""
        self.queue: _Queue[K] | None = None
        """The one it stands in, or is to come back to."""


class CostAware(Queueing[K, Any]):
    """Gives up the block with the least (uses per time held, as `LifetimePredictor` has learned) x cost(depth).

    Blocks of one class and, to a factor of two, one cost stand in a queue, least recently used first; a victim is the
    least worthy of the queues' heads. With the default cost each hit counts the same.
    """

    def __init__(self, capacity_blocks: int, cost: Cost = uniform) -> None:
        super().__init__()
        self.lifetimes = LifetimePredictor()
        self._cost = cost
        self._max_ghosts = max(MIN_GHOSTS, GHOSTS_PER_BLOCK * capacity_blocks)
        self._now = 0
        """In block accesses."""
        self._next_lesson = MIN_LESSON
        self._blocks: dict[K, Block[K]] = {}
        self._ghosts: OrderedDict[K, tuple[BlockClass, int, int]] = OrderedDict()
        self._heads: Heads[K] = Heads(self._learned)
        """All blocks but those aside and those that wait."""
        self._waiting: dict[K, Block[K]] = {}
        """They were to go and had children: they go after them."""

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        self._return(path)
        blocks: list[Block[K]] = []
        parent: Block[K] | None = None
        for at, key in enumerate(path, start=depth):
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = Block(key, self._cost(at))
            if parent is not None and block.parent is not parent:
                self._leave_parent(block)
                block.parent = parent
                parent.children += 1
            blocks.append(block)
            parent = block
        length = len(path).bit_length()
        for from_end, block in enumerate(reversed(blocks), start=1):
            self._now += 1
            self._use(block, min(from_end, MAX_FROM_END), length)
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

    def _learned(self, block: Block[K]) -> float:
        return self.lifetimes.value(block.block_class, self._now - block.used_at) * block.cost

    def _victim(self) -> tuple[K, Block[K]] | None:
        self._heads.refresh(self._now, len(self._blocks))
        while block := self._heads.pop():
            if not block.children:
                return block.key, block
            self._waiting[block.key] = block
        # Their children are in use: they are not, and who asks needs room.
        return self._waiting.popitem() if self._waiting else None

    def _put_back(self, key: K, place: Block[K]) -> None:
        self._now += 1
        place.used_at = self._now
        self._heads.add(place)

    def _give_up(self, key: K, place: Block[K]) -> None:
        del self._blocks[key]
        self._ghosts[key] = (place.block_class, place.used_at, place.uses)
        self._leave_parent(place)

    def _forget(self) -> None:
        while len(self._ghosts) > self._max_ghosts:
            _, (block_class, used_at, _) = self._ghosts.popitem(last=False)
            self.lifetimes.observe(block_class, self._now - used_at, used=False)

    def _use(self, block: Block[K], from_end: int, length: int) -> None:
        if block.used_at:
            self.lifetimes.observe(block.block_class, self._now - block.used_at, used=True)
            block.uses += 1
            self._take_out(block)
        elif ghost := self._ghosts.pop(block.key, None):
            block_class, used_at, block.uses = ghost
            self.lifetimes.observe(block_class, self._now - used_at, used=True)
            block.uses += 1
        block.used_at = self._now
        # What a sequence ends with seldom begins another one, and long prompts are asked about more often than once.
        block.block_class = (min(block.uses, MAX_USES), from_end, length)
        self._heads.add(block)

    def _take_out(self, block: Block[K]) -> None:
        """Of where it stands: in its queue, aside, or waiting for its children."""
        self._heads.take_out(block)
        self._waiting.pop(block.key, None)

    def _leave_parent(self, block: Block[K]) -> None:
        parent, block.parent = block.parent, None
        if parent is not None:
            parent.children -= 1
            if not parent.children and parent.key in self._waiting:
                del self._waiting[parent.key]
                self._heads.add(parent, first=True)

    def _queue_anew(self, heads: Heads[K]) -> None:
        """What stands in queues stands in those of `heads` from now on. O(blocks · log blocks)."""
        queued = [block for block in self._blocks.values() if block.queue and block.key in block.queue]
        for block in sorted(queued, key=lambda block: block.used_at):
            heads.add(block)
        self._heads = heads

    def _learn(self) -> None:
        self._next_lesson = self._now + max(MIN_LESSON, (len(self._blocks) + len(self._ghosts)) // 4)
        held = ((block.block_class, self._now - block.used_at) for block in self._blocks.values())
        given_up = ((block_class, self._now - used_at) for block_class, used_at, _ in self._ghosts.values())
        self.lifetimes.refresh(chain(held, given_up))


class Heads(Generic[K]):
    """Queues of blocks by class and power of two of the cost; the head worth least goes. O(log queues).

    `by_uses`: and by power of two of the uses, for a worth that tells these apart.

    Worth that `ages` changes slowly: it is looked at again when a block becomes the head, and for all of them after one
    access for every REFRESH_SHARE blocks, at least after MIN_REFRESH.
    """

    REFRESH_SHARE, MIN_REFRESH = 64, 48

    def __init__(self, worth: Callable[[Block[K]], float], *, by_uses: bool = False, ages: bool = True) -> None:
        self._worth = worth
        self._ages = ages
        self._by_uses = by_uses
        self._queues: dict[tuple[BlockClass, int, int], _Queue[K]] = {}
        self._heap: list[tuple[float, int, _Queue[K]]] = []
        self._pushed = 0
        self._fresh_until = 0

    def add(self, block: Block[K], *, first: bool = False) -> None:
        """As the most recently used of its queue; `first`: as the next to go."""
        uses = block.uses.bit_length() if self._by_uses else 0
        name = block.block_class, uses, math.frexp(block.cost)[1]
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
        is_head = first or not queue
        queue[block.key] = block
        block.queue = queue
        if first:
            queue.move_to_end(block.key, last=False)
        if is_head:
            self._push(queue)

    def take_out(self, block: Block[K]) -> None:
        """A no-op for one that is out."""
        if block.queue is not None:
            block.queue.pop(block.key, None)

    def pop(self) -> Block[K] | None:
        """Takes out the head that is worth least; None when there is none."""
        while self._heap:
            _, entry, queue = heapq.heappop(self._heap)
            if queue and entry == queue.entry:
                block = queue.popitem(last=False)[1]
                if queue:
                    self._push(queue)
                return block
        return None

    def refresh(self, now: int, num_blocks: int) -> None:
        if self._ages and now >= self._fresh_until:
            self._fresh_until = now + max(self.MIN_REFRESH, num_blocks // self.REFRESH_SHARE)
            self._heap = [self._entry(queue) for queue in self._queues.values() if queue]
            heapq.heapify(self._heap)

    def _push(self, queue: _Queue[K]) -> None:
        heapq.heappush(self._heap, self._entry(queue))

    def _entry(self, queue: _Queue[K]) -> tuple[float, int, _Queue[K]]:
        self._pushed += 1
        queue.entry = self._pushed
        return self._worth(next(iter(queue.values()))), self._pushed, queue
