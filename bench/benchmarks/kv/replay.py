"""A trace of prompts, given as their blocks' hashes, through a prefix cache of so many blocks."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sagellm_common.core.errors import ConfigError
from sagellm_common.kv_policy.eviction import EvictionPolicy

Trace = Sequence[Sequence[int]]
"""Per request the blocks of its prompt, in token order. A block's number stands for its whole prefix."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """`hit_rate` of all blocks asked for; `decision_us` is the policy's own time per block, of the processor."""

    hit_rate: float
    decision_us: float


def load_mooncake(path: Path) -> list[list[int]]:
    """Lines of `{"hash_ids": [int, …], …}`. Raises ConfigError naming the line that is none."""
    trace = []
    try:
        with path.open() as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    trace.append(_hash_ids(line, f"{path}:{number}"))
    except OSError as err:
        raise ConfigError(f"--trace {path}: {err.strerror}") from err
    if not any(trace):
        raise ConfigError(f"--trace {path}: no request in it has a block")
    return trace


def _hash_ids(line: str, where: str) -> list[int]:
    try:
        ids = json.loads(line)["hash_ids"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{where}: not a JSON object with hash_ids, as the mooncake format has them") from None
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise ConfigError(f"{where}: hash_ids are {ids!r}; a list of integers is needed")
    return ids


def ceiling(trace: Trace) -> float:
    """Hit rate of a cache that forgets nothing."""
    blocks = list(chain.from_iterable(trace))
    return 1.0 - len(set(blocks)) / len(blocks)


def replay(
    trace: Trace,
    capacity_blocks: int,
    policy: EvictionPolicy[Any],
    clock: Callable[[], int] = time.thread_time_ns,
) -> Replayed:
    """Each prompt hits its longest cached prefix; then all of it is cached, and the policy makes room."""
    held: set[Hashable] = set()
    hits = spent_ns = 0
    for path in trace:
        for block in path:
            if block not in held:
                break
            hits += 1
        held.update(path)
        began_ns = clock()
        policy.access(path)
        gone = policy.evict(len(held) - capacity_blocks) if len(held) > capacity_blocks else []
        spent_ns += clock() - began_ns
        held.difference_update(gone)
    asked = sum(map(len, trace))
    return Replayed(hits / asked, spent_ns / asked / 1e3)


def belady(trace: Trace, capacity_blocks: int) -> float:
    """Hit rate of the best that can be with all of the future known: of the blocks at hand, the one that is used again
    last is not kept (Belady 1966; a block may be passed over at once). Each hit counts, also of a block whose parents
    are not kept, so no policy can do better. Where blocks form prefixes it is no looser for that: a parent is used
    whenever its children are, and so no later, and what is kept is whole prefixes.
    """
    accesses = list(chain.from_iterable(trace))
    never = len(accesses)
    next_use, seen = [never] * len(accesses), dict[int, int]()
    for at in range(len(accesses) - 1, -1, -1):
        next_use[at] = seen.get(accesses[at], never)
        seen[accesses[at]] = at
    kept: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    hits = 0
    for at, block in enumerate(accesses):
        hits += kept.pop(block, None) is not None
        if next_use[at] == never:
            continue
        if len(kept) >= capacity_blocks:
            while kept.get(latest[0][1]) != -latest[0][0]:
                heapq.heappop(latest)
            if -latest[0][0] <= next_use[at]:
                continue
            del kept[heapq.heappop(latest)[1]]
        kept[block] = next_use[at]
        heapq.heappush(latest, (-next_use[at], block))
    return hits / len(accesses)
