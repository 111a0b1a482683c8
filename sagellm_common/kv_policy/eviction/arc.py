"""Adaptive Replacement Cache (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from sagellm_common.kv_policy.eviction.base import K, Queueing

ONCE, AGAIN = 0, 1


class Arc(Queueing[K, int]):
    """Two lists, used once and used again, whose shares follow the hits on what either has lately given up. O(1)."""

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._capacity = max(1, capacity_blocks)
        self._once: OrderedDict[K, None] = OrderedDict()
        self._again: OrderedDict[K, None] = OrderedDict()
        self._gone_once: OrderedDict[K, None] = OrderedDict()
        self._gone_again: OrderedDict[K, None] = OrderedDict()
        self._share = 0.0
        """How many blocks `_once` is meant to hold."""

    def access(self, path: Sequence[K], depth: int = 0) -> None:
        self._return(path)
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

    def remove(self, key: K) -> None:
        self._once.pop(key, None)
        self._again.pop(key, None)
        self._aside.pop(key, None)

    def __len__(self) -> int:
        return len(self._once) + len(self._again) + len(self._aside)

    def __iter__(self) -> Iterator[K]:
        return chain(self._once, self._again, self._aside)

    def _victim(self) -> tuple[K, int] | None:
        if self._once and (len(self._once) > self._share or not self._again):
            return self._once.popitem(last=False)[0], ONCE
        return (self._again.popitem(last=False)[0], AGAIN) if self._again else None

    def _put_back(self, key: K, place: int) -> None:
        (self._again if place == AGAIN else self._once)[key] = None

    def _give_up(self, key: K, place: int) -> None:
        (self._gone_again if place == AGAIN else self._gone_once)[key] = None

    def _forget(self) -> None:
        while len(self._once) + len(self._gone_once) > self._capacity and self._gone_once:
            self._gone_once.popitem(last=False)
        while len(self) + len(self._gone_once) + len(self._gone_again) > 2 * self._capacity and self._gone_again:
            self._gone_again.popitem(last=False)
