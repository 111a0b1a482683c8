"""Prefix blocks from the kv_stores, into blocks already allocated. A failure costs the hits, never the request.

locate ──► each extent to the nearest store that holds it ──► get and pull, all stores together ──► how far it reaches
                        ▲                                              │
                        └────── the extents of a store that failed ◄───┘ again, from others that hold them
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from prometheus_client import Counter

from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.token_pull import TokenPuller
from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import BlockHash, BlockIds, KvConversion, KvLayout, KvSource, TokenIds, pack_int32
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.matcher import contexts
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent, extents
from sagellm_common.rpc.lease_release import LeaseReleaser
from sagellm_common.rpc.store_client import StoreClient

log = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 2.0
"""For a first byte. The bytes of a long prompt take their time: see SLOWEST_BYTES_PER_S."""
SLOWEST_BYTES_PER_S = 200e6
"""A store that sends less than this is not waited for."""

FETCHES = Counter("sagellm_prefill_store_fetches", "Attempts to fetch prefix blocks from kv_store.", ["outcome"])


@dataclass(slots=True)
class _Run:
    """Blocks of one extent that are wanted: which stores hold how many of them, and how many are here."""

    extent: Extent
    holders: dict[str, int]
    here: int = 0

    @property
    def within_reach(self) -> int:
        """Leading blocks that some store holds."""
        return max(self.holders.values(), default=0)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What is to be filled: tokens [begin, end) of it, into the blocks of `table`. `hashes` and
    `contexts` of blocks in the stores' `layout`."""

    request_id: str
    token_ids: TokenIds
    hashes: Sequence[BlockHash]
    contexts: Sequence[bytes]
    layout: KvLayout
    table: BlockIds
    begin_token: int
    end_token: int
    deadline_s: float
    priority: int = 0
    lost: list[KvConversion] = field(default_factory=list)
    """What the stores say of blocks that they have not kept as they were."""
    disk_blocks: list[int] = field(default_factory=list)
    """Of what came, how many of the stores' blocks they had to read from their disks."""


class StoreFetch:
    """Into blocks of `pool`, whatever the size of the stores'."""

    def __init__(
        self, store: StoreClient, channel: PathsChannel, releaser: LeaseReleaser, pool: KVBackendProtocol
    ) -> None:
        self._store = store
        self._tokens = TokenPuller(channel, pool.regions(), pool.layout)
        self._releaser = releaser
        self._layout = pool.layout

    async def fetch(
        self,
        request_id: str,
        token_ids: TokenIds,
        allocation: Allocation,
        *,
        timeout_s: float,
        cache_salt: str = "",
        priority: int = 0,
    ) -> int:
        """Fills blocks after the cached ones with what the stores hold, raises `num_cached_tokens` and notes `origins`.

        Returns the number of tokens gained. At least one token stays to be computed. Takes half of timeout_s at most.
        Raises no SageError.
        """
        size = self._layout.block_size_tokens
        begin = max(allocation.num_cached_tokens // size, allocation.num_shared_blocks) * size
        end = (len(token_ids) - 1) // size * size
        if begin >= end or not self._store.available:
            return 0
        deadline_s = asyncio.get_running_loop().time() + timeout_s / 2
        try:
            layout = await self._store.layout()
            if layout is None:
                FETCHES.labels("miss").inc()
                return 0
            stop = min(-(-end // layout.block_size_tokens) * layout.block_size_tokens, len(token_ids))
            root = root_hash(layout, cache_salt)
            hashes = block_hashes(token_ids[:stop], layout.block_size_tokens, root)
            known = list(contexts(root, pack_int32(token_ids[:stop]), 4 * layout.block_size_tokens))
            table = allocation.block_ids
            prompt = _Prompt(request_id, token_ids, hashes, known, layout, table, begin, end, deadline_s, priority)
            runs = await self._located(prompt)
            whole = await self._fill(prompt, runs)
        except SageError as err:
            FETCHES.labels("failed").inc()
            log.warning("request %s goes without the kv_store: %r", request_id, err)
            return 0
        reached = max(begin, self._reached(prompt, runs))
        FETCHES.labels("failed" if not whole else "hit" if reached > begin else "miss").inc()
        before = allocation.num_cached_tokens
        if reached > begin:
            allocation.num_cached_tokens = reached
            for lost in prompt.lost:
                allocation.conversion = lost.beside(allocation.conversion)
        gained = allocation.num_cached_tokens - before
        from_disk = min(gained, sum(prompt.disk_blocks) * layout.block_size_tokens)
        allocation.origins = replace(allocation.origins, store_disk_tokens=from_disk)
        return gained

    async def _located(self, prompt: _Prompt) -> list[_Run]:
        """What is wanted and within reach, up to the first gap."""
        theirs = prompt.layout.block_size_tokens
        wanted = extents(prompt.hashes, prompt.begin_token // theirs)
        runs = []
        for extent, holders in zip(wanted, await self._store.locate(prompt.hashes, wanted, prompt.layout), strict=True):
            run = _Run(extent, holders)
            if run.within_reach:
                runs.append(run)
            if run.within_reach < extent.num_blocks:
                break
        extents_fit = EXTENT_BLOCKS * theirs % self._layout.block_size_tokens == 0
        return runs if extents_fit or not runs else self._from_one_store(runs)

    def _from_one_store(self, runs: Sequence[_Run]) -> list[_Run]:
        """Where extents end within our blocks: what one store has, without gaps, for a block cannot come from two."""
        store_id = self._store.nearest([id for id, count in runs[0].holders.items() if count == runs[0].within_reach])
        kept = []
        for run in itertools.takewhile(lambda run: store_id in run.holders, runs):
            kept.append(_Run(run.extent, {store_id: run.holders[store_id]}))
            if kept[-1].within_reach < run.extent.num_blocks:
                break
        return kept

    async def _fill(self, prompt: _Prompt, runs: Sequence[_Run]) -> bool:
        """Pulls the runs; False when some could not be had from any store that was said to hold them."""
        pending, whole, now_s = list(runs), True, asyncio.get_running_loop().time
        while pending and now_s() < prompt.deadline_s:
            failed: list[_Run] = []
            for_store: dict[str, list[_Run]] = {}
            for run in pending:
                most = run.within_reach
                store_id = self._choose([id for id, count in run.holders.items() if count == most], for_store)
                for_store.setdefault(store_id, []).append(run)
            async with asyncio.TaskGroup() as pulling:
                for store_id, theirs in for_store.items():
                    pulling.create_task(self._from(prompt, store_id, theirs, failed))
            pending = sorted((run for run in failed if run.holders), key=lambda run: run.extent.first)
            whole = whole and len(pending) == len(failed)
        return whole and not pending

    def _choose(self, holders: Sequence[str], for_store: Mapping[str, Sequence[_Run]]) -> str:
        """The nearest; by turns where several hold it."""
        least = min(len(for_store.get(store_id, ())) for store_id in holders)
        return self._store.nearest([id for id in holders if len(for_store.get(id, ())) == least])

    async def _from(self, prompt: _Prompt, store_id: str, runs: list[_Run], failed: list[_Run]) -> None:
        """Fills `runs` from one store and notes what is here; they go to `failed` when it cannot be had."""
        num_tokens = sum(run.within_reach for run in runs) * prompt.layout.block_size_tokens
        num_bytes = num_tokens // self._layout.block_size_tokens * self._layout.block_bytes
        left_s = prompt.deadline_s - asyncio.get_running_loop().time()
        timeout_s = min(FETCH_TIMEOUT_S + num_bytes / SLOWEST_BYTES_PER_S, left_s)
        try:
            with self._store.reading(store_id):
                async with asyncio.timeout(timeout_s):
                    got = await self._get_and_pull(prompt, store_id, runs, timeout_s)
        except (SageError, TimeoutError) as err:
            log.warning("request %s: kv_store %s gave nothing: %r", prompt.request_id, store_id, err)
            self._store.failed(store_id)
            for run in runs:
                del run.holders[store_id]
            failed += runs
            return
        for run in runs:
            run.here = min(got, run.within_reach)
            got -= run.here

    async def _get_and_pull(self, prompt: _Prompt, store_id: str, runs: list[_Run], timeout_s: float) -> int:
        """Returns how many of their blocks, counted over the runs, are here. Raises SageError."""
        size = prompt.layout.block_size_tokens
        parts = [range(run.extent.first, run.extent.first + run.within_reach) for run in runs]
        source = await self._store.get(
            store_id,
            [block for part in parts for block in prompt.hashes[part.start : part.stop]],
            np.concatenate([prompt.token_ids[part.start * size : part.stop * size] for part in parts]),
            prompt.layout,
            extents=[Extent(run.extent.key, part.start, part.stop) for run, part in zip(runs, parts, strict=True)],
            contexts=[context for part in parts for context in prompt.contexts[part.start : part.stop]],
        )
        if source is None:
            return 0
        committed = False
        try:
            await self._pull(prompt, source, parts, timeout_s)
            committed = True
        finally:
            self._releaser.release(source, committed)
        if source.conversion is not None:
            prompt.lost.append(source.conversion)
        prompt.disk_blocks.append(source.disk_blocks)
        return len(source.block_table)

    async def _pull(self, prompt: _Prompt, source: KvSource, parts: Sequence[range], timeout_s: float) -> None:
        """Brings the blocks of `parts`, as far as source.block_table goes, as if they were one sequence without gaps.

        Each stretch of parts but the first begins with an extent, each but the last ends with one: where a block of
        ours does, too.
        """
        theirs, ours = prompt.layout.block_size_tokens, self._layout.block_size_tokens
        step = math.lcm(theirs, ours)
        their_table: list[BlockIds] = []
        our_table: list[BlockIds] = []
        begin = end = 0
        left = source.block_table
        for stretch in _stretches(parts):
            blocks, left = left[: len(stretch)], left[len(stretch) :]
            if not len(blocks):
                break
            # From where a block begins on both sides, with nothing to be pulled before the prompt's beginning.
            origin = stretch.start * theirs // step * step
            stop = min((stretch.start + len(blocks)) * theirs, prompt.end_token) // ours * ours
            if not their_table:
                begin = max(0, prompt.begin_token - origin)
            their_table += [np.zeros(stretch.start - origin // theirs, np.int32), blocks]
            our_table.append(prompt.table[origin // ours : stop // ours])
            end += stop - origin
        if begin < end:
            await self._tokens.pull(
                replace(source, block_table=np.concatenate(their_table)),
                prompt.layout,
                np.concatenate(our_table),
                begin,
                end,
                timeout_s=timeout_s,
                priority=prompt.priority,
            )

    def _reached(self, prompt: _Prompt, runs: Sequence[_Run]) -> int:
        """The first token that is not here; a multiple of our block size."""
        theirs, ours = prompt.layout.block_size_tokens, self._layout.block_size_tokens
        at = prompt.begin_token // theirs
        for run in runs:
            if run.extent.first != at:
                break
            at += run.here
        return min(at * theirs, prompt.end_token) // ours * ours


def _stretches(parts: Sequence[range]) -> list[range]:
    """Neighbours as one."""
    found: list[range] = []
    for part in parts:
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return found
