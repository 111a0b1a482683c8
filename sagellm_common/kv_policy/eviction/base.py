"""What every eviction policy is: it hears which blocks are used, and says which ones go."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Sequence
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(Protocol[K]):
    """Ranks the blocks of one pool. Not thread-safe: the pool's lock guards it, and no method waits or does I/O.

    Blocks come as *paths*: the blocks of one sequence in token order, each the parent of the next. A block is of no
    use without its parents, so of one path the end goes first.
    """

    def access(self, path: Sequence[K]) -> None:
        """The sequence's blocks are used now. Blocks that are not held are held from now on."""

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        """Gives up `count` blocks, none of them in `keep`; fewer where there are not as many."""

    def remove(self, key: K) -> None:
        """The pool dropped the block for a reason of its own. Unknown ones are fine."""

    def __len__(self) -> int:
        """Blocks held."""

    def __iter__(self) -> Iterator[K]:
        """The blocks held, those about to go first where the policy knows an order."""
