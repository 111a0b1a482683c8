"""What every eviction policy is: it hears which blocks are used, and says which ones go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")

Cost = Callable[[int], float]
"""What it takes to compute the block with this number in its sequence again, over its size; more than 0."""


def uniform(depth: int) -> float:
    """Each block counts the same."""
    return 1.0


class EvictionPolicy(Protocol[K]):
    """Ranks the blocks of one pool. Not thread-safe: the pool's lock guards it, and no method waits or does I/O.

    Blocks come as *paths*: the blocks of one sequence in token order, each the parent of the next. A block is of no
    use without its parents, so of one path the end goes first.
    """

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        """The sequence's blocks are used now, the first of them its block number `depth`. Blocks that are not held are
        held from now on."""

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        """Gives up `count` blocks, none of them in `keep`, which are in use; fewer where there are not as many."""

    def remove(self, key: K) -> None:
        """The pool dropped the block for a reason of its own. Unknown ones are fine."""

    def __len__(self) -> int:
        """Blocks held."""

    def __iter__(self) -> Iterator[K]:
        """The blocks held, those about to go first where the policy knows an order."""


class Queueing(ABC, Generic[K, P]):
    """`evict` for policies that name one victim after the other.

    Victims that are in use stand aside, and are looked at again only after as many evictions as there are of them:
    O(1) for an eviction, however many blocks are in use and for however long. P is a place in the policy's queues.
    """

    def __init__(self) -> None:
        self._aside: dict[K, P] = {}
        self._until_look = 0

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        """See `EvictionPolicy`."""
        gone: list[K] = []
        while len(gone) < count:
            if self._aside and self._until_look <= 0:
                self._look(keep)
            victim = self._victim() or (self._look(keep) and self._victim())
            if not victim:
                break
            key, place = victim
            if key in keep:
                self._aside[key] = place
            else:
                self._give_up(key, place)
                self._until_look -= 1
                gone.append(key)
        self._forget()
        return gone

    def _look(self, keep: Container[K]) -> bool:
        """Puts back those aside that are not in use any more; whether there are any."""
        back = [key for key in self._aside if key not in keep]
        for key in back:
            self._put_back(key, self._aside.pop(key))
        self._until_look = len(self._aside)
        return bool(back)

    def _return(self, path: Sequence[K]) -> None:
        """For `access` to begin with: what stands aside is in its place again."""
        if self._aside:
            for key in path:
                if key in self._aside:
                    self._put_back(key, self._aside.pop(key))

    @abstractmethod
    def _victim(self) -> tuple[K, P] | None:
        """Takes the next one to go out of its queue."""

    @abstractmethod
    def _put_back(self, key: K, place: P) -> None:
        """It was in use until now."""

    def _give_up(self, key: K, place: P) -> None:
        """The victim does go."""

    def _forget(self) -> None:
        """Bounds what is remembered of those given up."""
