"""Fills a prefix index as a cluster would, and asks it as a router does. Each variant in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import TokenIds
from sagellm_common.prefix_reuse import native
from sagellm_common.prefix_reuse.hashing import chained, packed_block_hashes
from sagellm_common.prefix_reuse.holder_table import MAX_BLOCKS, HolderTable, NativeTable, PythonTable
from sagellm_common.prefix_reuse.index import PrefixReuseIndex

BLOCK_TOKENS = 16
LONGEST_TOKENS = 128 << 10
PROMPTS = 16
HOLDERS = 8
"""Workers that hold a prompt: the first of them an eighth of it, the last all."""
ORDERS = ("in order", "shuffled")
"""How a worker told the blocks of a prompt: as it computed them, or as a listing in no order would."""
ROOT = b"a root of a bench"[:16]


@dataclass(frozen=True, slots=True)
class Measured:
    variant: str
    order: str
    workers: int
    blocks_per_worker: int
    prompt_tokens: int
    hash_us: float
    match_us: float
    match_p99_us: float
    match_while_inserting_us: float
    """Median, while another thread inserts."""
    rss_bytes_per_block: float
    told_bytes_per_block: float
    """What the index says of itself."""
    inserted_per_s: float
    invalidate_ms: float


def run(variant: str, order: str, workers: int, blocks_per_worker: int, prompt_tokens: list[int]) -> list[Measured]:
    """Raises ConfigError for the compiled variant where it was not built."""
    table, hashed = _table(variant)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1 << 17, LONGEST_TOKENS).astype("<i4") for _ in range(PROMPTS)]
    chains = [packed_block_hashes(prompt, BLOCK_TOKENS, ROOT) for prompt in prompts]
    index = PrefixReuseIndex(table=table)
    before, began_s = psutil.Process().memory_info().rss, time.perf_counter()
    told = _fill(index, chains, order, workers, blocks_per_worker, rng)
    filled_s = time.perf_counter() - began_s
    metrics = index.metrics
    rss_per_block = (psutil.Process().memory_info().rss - before) / metrics.blocks
    rows = []
    for tokens in prompt_tokens:
        alone = [_ask(index, prompts[n % PROMPTS][:tokens], hashed) for n in range(6 * PROMPTS)]
        busy = _while_inserting(index, rng, lambda n, t=tokens: _ask(index, prompts[n % PROMPTS][:t], hashed))
        matches = sorted(match for _, match in alone)
        rows.append(
            (
                tokens,
                1e6 * median(hashing for hashing, _ in alone),
                1e6 * median(matches),
                1e6 * matches[int(0.99 * len(matches))],
                1e6 * median(match for _, match in busy),
            )
        )
    began_s = time.perf_counter()
    index.invalidate("worker-0")
    invalidate_ms = (time.perf_counter() - began_s) * 1e3
    cost = (rss_per_block, metrics.bytes_per_block, told / filled_s, invalidate_ms)
    return [Measured(variant, order, workers, blocks_per_worker, *row, *cost) for row in rows]


def _table(variant: str) -> tuple[HolderTable, Callable[[TokenIds, int, bytes], bytes]]:
    if variant == "dict":
        return PythonTable(MAX_BLOCKS, threading.Lock()), chained
    library = native.library()
    if library is None:
        raise ConfigError("the index is not compiled: python -m sagellm_common.prefix_reuse.native")
    return NativeTable(library, 1 << 28), packed_block_hashes


def _fill(
    index: PrefixReuseIndex,
    chains: list[bytes],
    order: str,
    workers: int,
    blocks_per_worker: int,
    rng: np.random.Generator,
) -> int:
    """Blocks that only one worker has, and between them the prompts. Returns how many were told."""
    told, length = 0, LONGEST_TOKENS // BLOCK_TOKENS
    parts: dict[int, list[bytes]] = {}
    for n, hashes in enumerate(chains):
        for holder in range(HOLDERS):
            part = hashes[: 16 * (length * (holder + 1) // HOLDERS)]
            parts.setdefault((n * HOLDERS + holder) % workers, []).append(part)
    for worker in range(workers):
        mine = parts.get(worker, [])
        own = max(0, blocks_per_worker - sum(map(len, mine)) // 16)
        for part in mine:
            if order == "shuffled":
                part = rng.permutation(np.frombuffer(part, "V16")).tobytes()
            index.insert(f"worker-{worker}", part)
        for at in range(0, own, length):
            index.insert(f"worker-{worker}", rng.bytes(16 * min(length, own - at)))
        told += own + sum(map(len, mine)) // 16
    return told


def _ask(
    index: PrefixReuseIndex, prompt: TokenIds, hashed: Callable[[TokenIds, int, bytes], bytes]
) -> tuple[float, float]:
    """(hashing, matching) in seconds."""
    began_s = time.perf_counter()
    hashes = hashed(prompt, BLOCK_TOKENS, ROOT)
    hashed_s = time.perf_counter()
    found = index.lookup(hashes)
    ended_s = time.perf_counter()
    assert len(found) == HOLDERS, f"{len(found)} workers hold a prompt that {HOLDERS} were told to hold"
    assert max(depths[-1] for depths in found.values()) == len(prompt) // BLOCK_TOKENS
    return hashed_s - began_s, ended_s - hashed_s


def _while_inserting(
    index: PrefixReuseIndex, rng: np.random.Generator, ask: Callable[[int], tuple[float, float]]
) -> list[tuple[float, float]]:
    batches, asked = [rng.bytes(16 << 15) for _ in range(8)], list[tuple[float, float]]()

    def insert() -> None:
        for batch in batches:
            index.insert("worker-1", batch)

    inserting = threading.Thread(target=insert)
    inserting.start()
    while inserting.is_alive():
        asked.append(ask(len(asked)))
    inserting.join()
    return asked
