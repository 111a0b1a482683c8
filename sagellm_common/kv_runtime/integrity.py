"""Whether a pool's books are right, and its cached blocks still what they were.

    free + used + cached == total        nothing is lost, nothing is counted twice
    references == holders                every table and the cache, and nobody else
    charged == held, by account          what quotas go by
    digest == digest                     of a sample: a cached block never changes, whoever writes elsewhere

The last one reads KV, so only a sample of blocks is looked at each time; in turn, so that all are in the end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from sagellm_common.core.kv import KvMemory
from sagellm_common.core.types import BlockHash, BlockIds, KvHealth
from sagellm_common.kv_runtime.pool import KVPool

log = logging.getLogger(__name__)

SAMPLE_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """What one check found; no `problems`: all is well. `corrupt` blocks are not in the cache any more."""

    problems: tuple[str, ...] = ()
    sampled_blocks: int = 0
    corrupt: tuple[BlockHash, ...] = ()


def check(pool: KVPool, sample: Sequence[BlockHash] = ()) -> IntegrityReport:
    """Checks the books of all blocks, and the bytes of the cached blocks named by `sample`. Changes nothing but that
    corrupt ones are dropped. O(blocks) under the pool's lock; the sample is read outside it."""
    with pool.lock:
        problems = _wrong_books(pool)
    corrupt, sampled = _changed(pool, sample)
    if corrupt:
        problems.append(f"{len(corrupt)} of {sampled} cached blocks are not what they were; they are dropped")
    return IntegrityReport(tuple(problems), sampled, tuple(corrupt))


def _wrong_books(pool: KVPool) -> list[str]:
    blocks, cache = pool.blocks, pool.cache
    problems = blocks.problems()
    stats = pool.get_utilization()
    if not stats.balanced:
        problems.append(
            f"{stats.free_blocks} free + {stats.used_blocks} used + {stats.cached_blocks} cached blocks are not "
            f"the total of {stats.total_blocks}"
        )
    holders = np.zeros(blocks.num_blocks, np.int32)
    for table in pool.tables():
        np.add.at(holders, table.blocks, 1)
    holders[cache.blocks()] += 1
    wrong = np.flatnonzero(holders != blocks.ref_counts)
    if len(wrong):
        first = int(wrong[0])
        problems.append(
            f"{len(wrong)} blocks have other reference counts than holders: block {first} has "
            f"{blocks.ref_counts[first]} and {holders[first]}"
        )
    lost = [key for key in cache.hashes() if cache.hash_of(cache[key].block) != key]
    if lost or len(cache) != len(cache.blocks()):
        problems.append(f"the cache finds {len(cache)} hashes in {len(cache.blocks())} blocks, {len(lost)} of them not")
    return problems


def _changed(pool: KVPool, sample: Sequence[BlockHash]) -> tuple[list[BlockHash], int]:
    """(those of the blocks whose bytes are not those of the last time, how many were looked at)."""
    with pool.lock:
        present = [key for key in dict.fromkeys(sample) if key in pool.cache]
        table = pool.cache.blocks_of(present)
        held = pool.hold_to_read(table)
    try:
        digests = _digests(pool.regions(), held.block_ids)
        with pool.lock:
            corrupt = []
            for key, digest in zip(present, digests, strict=True):
                if key in pool.cache:
                    entry = pool.cache[key]
                    corrupt += [key] if entry.digest not in (b"", digest) else []
                    entry.digest = entry.digest or digest
            pool.cache.remove(corrupt)
    finally:
        pool.free(held)
    return corrupt, len(present)


def _digests(memory: KvMemory, block_ids: BlockIds) -> list[bytes]:
    if not len(block_ids):
        return []
    with memory.reading(block_ids) as (region, ids):
        return [xxhash.xxh3_64_digest(region.block(int(block))) for block in ids]


class SelfCheck:
    """`check`, again and again, over another sample each time; what it has found so far."""

    def __init__(self, pool: KVPool, sample_blocks: int = SAMPLE_BLOCKS) -> None:
        self.pool = pool
        self._sample_blocks = sample_blocks
        self._left: list[BlockHash] = []
        self._found = KvHealth()

    def health(self) -> KvHealth:
        """What was found so far, and who has how much of the pool now."""
        pool = self.pool
        return replace(
            self._found,
            moved_blocks=pool.moved_blocks,
            tenants=tuple(pool.tenant_usage()),
            rejected_hits=pool.rejected,
            lifetime_skill=pool.lifetime_skill,
        )

    def run(self) -> IntegrityReport:
        """Any thread, one at a time. What is wrong is logged: a pool that has lost its count needs a restart."""
        if not self.pool.regions().num_blocks:
            return IntegrityReport()  # it has no memory yet
        if not self._left:
            with self.pool.lock:
                self._left = self.pool.cache.hashes()
        sample, self._left = self._left[: self._sample_blocks], self._left[self._sample_blocks :]
        report, fragmentation, before = check(self.pool, sample), self.pool.get_fragmentation(), self._found
        self._found = KvHealth(
            checks=before.checks + 1,
            failed_checks=before.failed_checks + bool(report.problems),
            problems=report.problems,
            sampled_blocks=before.sampled_blocks + report.sampled_blocks,
            corrupt_blocks=before.corrupt_blocks + len(report.corrupt),
            internal_fragmentation=fragmentation.internal,
            external_fragmentation=fragmentation.external,
        )
        for problem in report.problems:
            log.error("the KV pool's self-check: %s", problem)
        return report
