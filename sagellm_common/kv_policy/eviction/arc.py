"""Adaptive Replacement Cache (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from itertools import chain
from typing import Generic

from sagellm_common.kv_policy.eviction.base import K


class Arc(Generic[K]):
    """Two lists, used once and used again, whose shares follow the hits on what either has lately given up. O(1)."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = max(1, capacity_blocks)
        self._once: OrderedDict[K, None] = OrderedDict()
        self._again: OrderedDict[K, None] = OrderedDict()
        self._gone_once: OrderedDict[K, None] = OrderedDict()
        self._gone_again: OrderedDict[K, None] = OrderedDict()
        self._share = 0.0
        """How many blocks `_once` is meant to hold."""

    def access(self, path: Sequence[K]) -> None:
        for key in reversed(path):
            if key in self._once:
                del self._once[key]
                self._again[key] = None
            elif key in self._again:
                self._again.move_to_end(key)
            elif key in self._gone_once:
                grow = max(1.0, len(self._gone_again) / len(self._gone_once))
                self._share = min(self._share + grow, self._capacity)
                del self._gone_once[key]
                self._again[key] = None
            elif key in self._gone_again:
                shrink = max(1.0, len(self._gone_once) / len(self._gone_again))
                self._share = max(self._share - shrink, 0.0)
                del self._gone_again[key]
                self._again[key] = None
            else:
                self._once[key] = None

    def evict(self, count: int, keep: Container[K] = ()) -> list[K]:
        gone: list[K] = []
        while len(gone) < count:
            first_once = len(self._once) > self._share
            for held, ghosts in self._lists() if first_once else reversed(self._lists()):
                key = next((key for key in held if key not in keep), None)
                if key is not None:
                    del held[key]
                    ghosts[key] = None
                    gone.append(key)
                    break
            else:
                break
        while len(self._once) + len(self._gone_once) > self._capacity and self._gone_once:
            self._gone_once.popitem(last=False)
        while len(self) + len(self._gone_once) + len(self._gone_again) > 2 * self._capacity and self._gone_again:
            self._gone_again.popitem(last=False)
        return gone

    def remove(self, key: K) -> None:
        self._once.pop(key, None)
        self._again.pop(key, None)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def __iter__(self) -> Iterator[K]:
        return chain(self._once, self._again)

    def _lists(self) -> list[tuple[OrderedDict[K, None], OrderedDict[K, None]]]:
        return [(self._once, self._gone_once), (self._again, self._gone_again)]
