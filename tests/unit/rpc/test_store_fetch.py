"""Which stores are asked for what, what they are blamed for, and what a failure leaves of a hit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.errors import KvCorrupt, PeerLost
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.types import BlockHash, KvLayout, KvSource, TokenIds, as_token_ids
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent
from sagellm_common.rpc.store_fetch import FETCH_TIMEOUT_S, SLOWEST_BYTES_PER_S, StoreFetch
from tests.support.topology import LAYOUT
from tests.support.waiting import eventually

SIZE = LAYOUT.block_size_tokens
EXTENT_TOKENS = EXTENT_BLOCKS * SIZE
PROMPT = as_token_ids(range(3 * EXTENT_TOKENS + 5 * SIZE + 3))
FULL_BLOCKS = 3 * EXTENT_BLOCKS + 5


@dataclass
class Pool:
    """What fetching asks of a pool: blocks of a token each and nothing else."""

    layout: KvLayout

    def regions(self) -> KvRegion:
        size, blocks = self.layout.block_bytes, 4096 // self.layout.block_size_tokens * SIZE
        return KvRegion(memoryview(bytearray(size * blocks)), size, blocks)


@dataclass
class Stores:
    """Stores, byte path and releaser in one: each store's blocks, whom it fails, and what was asked for.

    A block's bytes are the first of its tokens; a layout's block_bytes is 8 x its tokens.
    """

    layout_: KvLayout
    held: dict[str, set[BlockHash]]
    failing: dict[str, Exception] = field(default_factory=dict)
    hanging: set[str] = field(default_factory=set)
    gets: list[tuple[str, int]] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)
    released: list[tuple[str, bool]] = field(default_factory=list)
    encodes: bool = False
    pool: Pool = field(init=False)

    @property
    def available(self) -> bool:
        return bool(self.held)

    async def layout(self) -> KvLayout | None:
        return self.layout_

    async def locate(
        self, hashes: Sequence[BlockHash], wanted: Sequence[Extent], layout: KvLayout
    ) -> list[dict[str, int]]:
        assert layout == self.layout_
        found = []
        for extent in wanted:
            counts = {}
            for store_id, held in self.held.items():
                count = 0
                for block_hash in hashes[extent.first : extent.stop]:
                    if block_hash not in held:
                        break
                    count += 1
                if count:
                    counts[store_id] = count
            found.append(counts)
        return found

    def nearest(self, store_ids: Sequence[str]) -> str:
        return min(store_ids)

    def reading(self, store_id: str) -> Any:
        return nullcontext()

    async def get(
        self,
        store_id: str,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        layout: KvLayout,
        extents: Sequence[Extent],
        contexts: Sequence[bytes],
    ) -> KvSource | None:
        assert len(token_ids) == len(hashes) * layout.block_size_tokens
        assert len(contexts) == len(hashes)
        assert sum(extent.num_blocks for extent in extents) == len(hashes)
        self.gets.append((store_id, len(hashes)))
        size, here = layout.block_size_tokens, []
        for n, block_hash in enumerate(hashes):
            if block_hash not in self.held[store_id]:
                break
            here.append(int(token_ids[n * size]) // size)  # a store's block id is the number in the prompt
        if not here:
            return None
        table = as_token_ids(here)
        return KvSource(
            store_id, 1, store_id, "i", "127.0.0.1:1", "127.0.0.1:2", "tcp", table, len(here) * size, 30_000
        )

    def failed(self, worker_id: str) -> None:
        self.blamed.append(worker_id)

    def release(self, source: KvSource, committed: bool) -> None:
        self.released.append((source.worker_id, committed))


class Puller:
    """Where `TokenPuller` is: notes which token came where."""

    def __init__(self, stores: Stores, layout: KvLayout) -> None:
        self.stores, self.layout = stores, layout
        self.here: dict[int, set[int]] = {}
        """Block of ours → tokens of the prompt."""

    async def pull(
        self,
        source: KvSource,
        layout: KvLayout,
        target: np.ndarray[Any, Any],
        begin: int,
        end: int,
        *,
        timeout_s: float,
        priority: int,
    ) -> TransferResult:
        self.stores.timeouts.append(timeout_s)
        if source.worker_id in self.stores.hanging:
            await asyncio.Event().wait()
        if source.worker_id in self.stores.failing:
            raise self.stores.failing[source.worker_id]
        theirs, ours = layout.block_size_tokens, self.layout.block_size_tokens
        assert begin % ours == 0 and begin < end <= len(source.block_table) * theirs
        assert len(target) * ours >= end
        for at in range(begin, end):
            token = int(source.block_table[at // theirs]) * theirs + at % theirs
            self.here.setdefault(int(target[at // ours]), set()).add(token)
        return TransferResult(0, 0.0, 1)


@dataclass
class Fetching:
    stores: Stores
    puller: Puller
    allocation: Allocation
    fetch: StoreFetch

    async def __call__(self, timeout_s: float = 10.0) -> int:
        gained = await self.fetch.fetch("r", PROMPT, self.allocation, timeout_s=timeout_s)
        # What counts as cached is really there, each token in its place.
        size = self.puller.layout.block_size_tokens
        for n in range((self.allocation.num_cached_tokens - gained) // size, self.allocation.num_cached_tokens // size):
            assert self.puller.here[int(self.allocation.block_ids[n])] == set(range(n * size, (n + 1) * size)), n
        return gained


def hashes_of(layout: KvLayout) -> list[BlockHash]:
    return block_hashes(PROMPT, layout.block_size_tokens, root_hash(layout))


def fetching(
    held: dict[str, Sequence[int]], *, theirs: int = SIZE, ours: int = SIZE, cached_blocks: int = 0, **more: Any
) -> Fetching:
    """`held`: store → numbers of the extents it has, all of their blocks."""
    stored, mine = replace(LAYOUT, block_size_tokens=theirs), replace(LAYOUT, block_size_tokens=ours)
    names = hashes_of(stored)
    blocks = {
        store_id: {h for n in extents for h in names[n * EXTENT_BLOCKS : (n + 1) * EXTENT_BLOCKS]}
        for store_id, extents in held.items()
    }
    stores = Stores(stored, blocks, **more)
    pool = Pool(mine)
    fetch = StoreFetch(stores, stores, stores, pool)  # type: ignore[arg-type]
    puller = Puller(stores, mine)
    fetch._tokens = puller  # type: ignore[assignment]
    num_blocks = -(-len(PROMPT) // ours)
    table = as_token_ids(np.random.default_rng(0).permutation(num_blocks))
    return Fetching(stores, puller, Allocation(table, cached_blocks * ours, cached_blocks), fetch)


async def test_each_store_gives_its_extents_in_one_call() -> None:
    fetch = fetching({"a": [0, 2], "b": [1, 3]})
    assert await fetch() == FULL_BLOCKS * SIZE
    assert sorted(fetch.stores.gets) == [("a", 2 * EXTENT_BLOCKS), ("b", EXTENT_BLOCKS + 5)]
    assert sorted(fetch.stores.released) == [("a", True), ("b", True)]


async def test_it_begins_where_the_own_cache_ends() -> None:
    fetch = fetching({"a": [0, 2], "b": [1, 3]}, cached_blocks=EXTENT_BLOCKS - 2)
    assert await fetch() == (FULL_BLOCKS - EXTENT_BLOCKS + 2) * SIZE
    assert sorted(fetch.stores.gets) == [("a", 2 + EXTENT_BLOCKS), ("b", EXTENT_BLOCKS + 5)]


async def test_replicas_share_the_work() -> None:
    fetch = fetching({"a": range(4), "b": range(4)})
    assert await fetch() == FULL_BLOCKS * SIZE
    assert {store for store, _ in fetch.stores.gets} == {"a", "b"}


async def test_a_gap_ends_the_hit() -> None:
    fetch = fetching({"a": [0, 3], "b": [1]})
    assert await fetch() == 2 * EXTENT_TOKENS
    assert ("a", EXTENT_BLOCKS) in fetch.stores.gets


async def test_part_of_an_extent_is_a_hit_and_the_end_of_it() -> None:
    fetch = fetching({"a": [0, 1], "b": [1, 2]})
    for store_id, extent, keep in (("a", 1, 3), ("b", 1, 7)):
        fetch.stores.held[store_id] -= set(hashes_of(LAYOUT)[extent * 32 + keep : extent * 32 + 32])
    assert await fetch() == EXTENT_TOKENS + 7 * SIZE


@pytest.mark.parametrize(
    ("theirs", "ours"), [(16, 32), (32, 16), (8, 16), (16, 8), (24, 16), (16, 24), (17, 16), (16, 17)]
)
@pytest.mark.parametrize("cached", [0, 3])
async def test_blocks_of_other_sizes(theirs: int, ours: int, cached: int) -> None:
    """Extents that end within our blocks (the last two) come from one store, as far as that goes."""
    fetch = fetching({"a": [0, 2, 4, 6], "b": [1, 3, 5]}, theirs=theirs, ours=ours, cached_blocks=cached)
    gained = await fetch()
    stored_tokens = len(PROMPT) // theirs * theirs
    if EXTENT_BLOCKS * theirs % ours == 0:
        reach = min(7 * EXTENT_BLOCKS * theirs, stored_tokens, (len(PROMPT) - 1) // ours * ours) // ours * ours
        assert gained == reach - cached * ours
    else:
        assert 0 < gained <= EXTENT_BLOCKS * theirs


async def test_another_replica_stands_in_for_a_store_that_fails_in_the_pull() -> None:
    fetch = fetching({"a": range(4), "b": range(4)}, failing={"a": PeerLost("gone")})
    assert await fetch() == FULL_BLOCKS * SIZE
    assert fetch.stores.blamed == ["a"]
    assert sorted(fetch.stores.released) == [("a", False), ("b", True), ("b", True)]


async def test_without_a_replica_the_hit_ends_before_what_was_lost() -> None:
    fetch = fetching({"a": [0, 3], "b": [1], "c": [2]}, failing={"b": KvCorrupt("flipped")})
    assert await fetch() == EXTENT_TOKENS
    assert fetch.stores.blamed == ["b"]


async def test_a_replica_that_holds_less_gives_what_it_has() -> None:
    fetch = fetching({"a": range(4), "b": [0]}, failing={"a": PeerLost("gone")})
    fetch.stores.held["b"] -= set(hashes_of(LAYOUT)[9:])
    assert await fetch() == 9 * SIZE


async def test_a_store_that_has_evicted_it_meanwhile_shortens_the_hit() -> None:
    fetch = fetching({"a": [0], "b": [1, 2]})

    async def locate(*_: Any) -> list[dict[str, int]]:
        return [{"a": 32}, {"b": 32}, {"b": 32}, {"a": 5}]

    fetch.stores.held["b"] -= set(hashes_of(LAYOUT)[40:])
    fetch.stores.locate = locate  # type: ignore[method-assign]
    assert await fetch() == 40 * SIZE


async def test_a_miss_and_no_store() -> None:
    fetch = fetching({"a": []})
    assert await fetch() == 0
    assert fetch.stores.gets == []
    fetch.stores.held.clear()
    assert await fetch() == 0
    nothing = fetching({"a": [0]}, cached_blocks=FULL_BLOCKS)
    assert await nothing() == 0


async def test_stores_that_are_empty_or_do_not_answer_cost_nothing() -> None:
    fetch = fetching({"a": [0]})
    fetch.stores.layout_ = None  # type: ignore[assignment]
    assert await fetch() == 0

    async def lost() -> KvLayout:
        raise PeerLost("gone")

    fetch.stores.layout = lost  # type: ignore[method-assign]
    assert await fetch() == 0


async def test_a_long_prompt_is_given_the_time_its_bytes_take() -> None:
    fetch = fetching({"a": [0]})
    big = replace(LAYOUT, block_bytes=1 << 28)
    fetch.fetch._layout = big
    assert await fetch(timeout_s=1000.0) == EXTENT_TOKENS
    assert fetch.stores.timeouts == [FETCH_TIMEOUT_S + EXTENT_BLOCKS * big.block_bytes / SLOWEST_BYTES_PER_S]


async def test_a_silent_store_takes_half_of_the_time_at_most() -> None:
    fetch = fetching({"a": [0, 1, 2, 3]}, hanging={"a"})
    assert await fetch(timeout_s=0.1) == 0
    assert fetch.stores.blamed == ["a"]


async def test_a_client_that_leaves_during_the_pull_is_not_the_stores_fault() -> None:
    fetch = fetching({"a": [0]}, hanging={"a"})
    task = asyncio.create_task(fetch())
    await eventually(lambda: bool(fetch.stores.timeouts))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (fetch.stores.blamed, fetch.stores.released) == ([], [("a", False)])
