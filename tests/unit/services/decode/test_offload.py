from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.types import BlockHash, KvLayout, KvSource, TokenIds, as_token_ids
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.store_client import PutResult
from services.decode.offload import EXTENTS_PER_PUT, MAX_CONCURRENT, MAX_POOL_SHARE, OFFLOADS, Offloader
from tests.support.simulated_engine import SimulatedPool
from tests.support.topology import LAYOUT, make_record
from tests.support.waiting import eventually

TOKENS = as_token_ids(range(40))
BLOCKS = 32


@dataclass
class Put:
    store_id: str
    hashes: list[BlockHash]
    tokens: list[int]
    source: KvSource
    extents: list[Extent]
    tenant: str


class FakeStore:
    """`present`: how many leading blocks of each extent each owner holds, by store; all own everything."""

    def __init__(self) -> None:
        self.available = True
        self.present = {"kv-store-0": 0}
        self.failing: dict[str, Exception] = {}
        self.full: set[str] = set()
        self.stored: KvLayout | None = None
        self.go = asyncio.Event()
        self.puts: list[Put] = []
        self.error: Exception | None = None
        self.under_way = 0

    async def layout(self) -> KvLayout | None:
        return self.stored

    def first_layout(self) -> KvLayout:
        return LAYOUT

    async def owned(
        self, hashes: Sequence[BlockHash], wanted: Sequence[Extent], layout: KvLayout
    ) -> list[dict[str, int]]:
        self.under_way += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return [{store: min(n, extent.num_blocks) for store, n in self.present.items()} for extent in wanted]

    async def put(
        self,
        store_id: str,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        source: KvSource,
        layout: KvLayout,
        *,
        timeout_s: float,
        extents: Sequence[Extent],
        contexts: Sequence[bytes],
        tenant: str,
    ) -> PutResult:
        assert len(contexts) == len(hashes)
        if store_id in self.failing:
            raise self.failing[store_id]
        self.puts.append(Put(store_id, list(hashes), token_ids.tolist(), source, list(extents), tenant))
        return PutResult(0 if store_id in self.full else len(hashes), 0, 0)


class Setup:
    def __init__(self) -> None:
        self.record = make_record("decode-0")
        self.pool = SimulatedPool(LAYOUT, BLOCKS)
        self.leases = HandoffSource(30.0, ManualClock(), self.pool.free)
        self.store = FakeStore()
        self.background = Background()
        self.offloader = Offloader(self.store, self.leases, self, LAYOUT, self.background, BLOCKS)  # type: ignore[arg-type]

    def offer(self, request_id: str = "r1", valid: int = 39) -> list[int]:
        """As the loop does: what is not taken over is freed at the end of the `with`. Returns the block ids."""
        with OwnedBlocks(self.pool, self.pool.allocate(TOKENS, 40)) as blocks:
            blocks.allocation.num_cached_tokens = valid
            block_ids: list[int] = blocks.allocation.block_ids.tolist()
            self.offloader.offer(request_id, 1, TOKENS, "", blocks, "acme")
        return block_ids

    @property
    def used_blocks(self) -> int:
        return self.pool.get_utilization().used_blocks


@pytest.fixture
async def setup() -> Setup:
    return Setup()


async def finished(setup: Setup) -> None:
    await eventually(lambda: not len(setup.background))


async def test_full_blocks_go_to_the_store_and_are_freed(setup: Setup) -> None:
    setup.offer()
    assert setup.used_blocks == 3
    setup.store.go.set()
    await finished(setup)
    (put,) = setup.store.puts
    assert put.hashes == block_hashes(TOKENS[:32], 16, root_hash(LAYOUT))
    assert put.tokens == list(range(32))
    assert (len(put.source.block_table), put.source.num_tokens) == (2, 32)
    assert (put.extents, put.tenant) == ([Extent(put.hashes[0], 0, 2)], "acme")
    assert setup.used_blocks == 0
    assert len(setup.leases) == 0


async def test_what_the_store_has_is_not_sent(setup: Setup) -> None:
    setup.store.go.set()
    setup.store.present = {"kv-store-0": 2}
    setup.offer()
    await finished(setup)
    assert setup.store.puts == []
    setup.store.present = {"kv-store-0": 1}
    block_ids = setup.offer()
    await finished(setup)
    (put,) = setup.store.puts
    assert put.hashes == block_hashes(TOKENS, 16, root_hash(LAYOUT))[1:2]
    assert put.tokens == list(range(16, 32))
    assert put.source.block_table.tolist() == block_ids[1:2]
    assert put.extents == [Extent(block_hashes(TOKENS, 16, root_hash(LAYOUT))[0], 1, 2)]


@pytest.mark.parametrize(
    ("size", "present", "first_hash", "first_block"), [(8, 1, 0, 0), (8, 3, 2, 1), (32, 0, 0, 0), (24, 0, 0, 0)]
)
async def test_a_store_of_other_blocks_is_offered_its_own(
    setup: Setup, size: int, present: int, first_hash: int, first_block: int
) -> None:
    """Hashed as it has them, and from where a block begins on both sides."""
    setup.store.stored = replace(LAYOUT, block_size_tokens=size, dtype="bfloat16")
    setup.store.present = {"kv-store-0": present}
    setup.store.go.set()
    block_ids = setup.offer()
    await finished(setup)
    (put,) = setup.store.puts
    full = 32 // size * size
    assert put.hashes == block_hashes(TOKENS[:full], size, root_hash(setup.store.stored))[first_hash:]
    assert put.tokens == list(range(first_hash * size, full))
    assert put.source.block_table.tolist() == block_ids[first_block:2]


@pytest.mark.parametrize("why", ["no full block", "no store"])
async def test_nothing_to_offload(setup: Setup, why: str) -> None:
    setup.store.available = why != "no store"
    setup.offer(valid=15 if why == "no full block" else 39)
    assert len(setup.background) == 0
    assert setup.used_blocks == 0


async def test_some_wait_their_turn_and_what_would_crowd_out_sequences_is_dropped(setup: Setup) -> None:
    fit = int(BLOCKS * MAX_POOL_SHARE) // 2  # two full blocks each
    assert fit > MAX_CONCURRENT
    for i in range(fit + 1):
        setup.offer(f"r{i}")
    assert len(setup.leases) == fit
    await eventually(lambda: setup.store.under_way == MAX_CONCURRENT)
    setup.store.go.set()
    await finished(setup)
    assert len(setup.store.puts) == fit
    setup.offer("later")
    await finished(setup)
    assert len(setup.store.puts) == fit + 1
    assert setup.used_blocks == 0


async def test_a_sequence_as_long_as_the_pool_is_stored_when_nothing_else_waits(setup: Setup) -> None:
    tokens = as_token_ids(range(BLOCKS * LAYOUT.block_size_tokens))
    for request_id in ("long", "too much"):
        pool = SimulatedPool(LAYOUT, BLOCKS)
        with OwnedBlocks(pool, pool.allocate(tokens, len(tokens))) as blocks:
            blocks.allocation.num_cached_tokens = len(tokens)
            setup.offloader.offer(request_id, 1, tokens, "", blocks)
    setup.store.go.set()
    await finished(setup)
    assert [len(put.hashes) for put in setup.store.puts] == [BLOCKS]


async def test_the_same_request_id_again_is_another_transfer(setup: Setup) -> None:
    setup.offer("r1")
    setup.offer("r1")
    assert len(setup.leases) == 2
    setup.store.go.set()
    await finished(setup)
    assert setup.used_blocks == 0


def offer_long(setup: Setup, num_blocks: int, layout: KvLayout = LAYOUT) -> list[int]:
    """A sequence of so many full blocks of its own pool; returns the block ids."""
    tokens = as_token_ids(range(num_blocks * layout.block_size_tokens))
    pool = SimulatedPool(layout, num_blocks)
    setup.leases = HandoffSource(30.0, ManualClock(), pool.free)
    setup.offloader = Offloader(setup.store, setup.leases, setup, layout, setup.background, num_blocks)  # type: ignore[arg-type]
    with OwnedBlocks(pool, pool.allocate(tokens, len(tokens))) as blocks:
        blocks.allocation.num_cached_tokens = len(tokens)
        block_ids: list[int] = blocks.allocation.block_ids.tolist()
        setup.offloader.offer("long", 1, tokens, "", blocks)
    return block_ids


async def test_each_store_gets_what_it_lacks_of_each_extent_in_one_call(setup: Setup) -> None:
    setup.store.present = {"a": 0, "b": 31}
    setup.store.go.set()
    block_ids = offer_long(setup, 3 * EXTENT_BLOCKS)
    await finished(setup)
    puts = {put.store_id: put for put in setup.store.puts}
    assert puts["a"].source.block_table.tolist() == block_ids
    assert puts["b"].source.block_table.tolist() == block_ids[31::32]
    assert puts["b"].tokens == [token for n in (31, 63, 95) for token in range(n * 16, n * 16 + 16)]
    assert [(e.first, e.stop) for e in puts["b"].extents] == [(31, 32), (63, 64), (95, 96)]
    assert len(setup.leases) == 0


async def test_a_store_that_fails_is_no_reason_to_give_others_less(setup: Setup) -> None:
    setup.store.present = {"a": 0, "b": 0}
    setup.store.failing["a"] = PeerLost("gone")
    setup.store.go.set()
    failed = OFFLOADS.labels("failed")._value.get()
    setup.offer()
    await finished(setup)
    assert [put.store_id for put in setup.store.puts] == ["b"]
    assert OFFLOADS.labels("failed")._value.get() == failed + 1


@pytest.mark.parametrize("full", [False, True])
async def test_a_long_sequence_is_offered_in_several_calls_until_the_store_is_full(setup: Setup, full: bool) -> None:
    setup.store.full = {"kv-store-0"} if full else set()
    setup.store.go.set()
    offer_long(setup, 2 * EXTENTS_PER_PUT * EXTENT_BLOCKS + 1)
    await finished(setup)
    expected = [EXTENTS_PER_PUT * EXTENT_BLOCKS] * 2 + [1]
    assert [len(put.hashes) for put in setup.store.puts] == expected[: 1 if full else 3]


async def test_extents_that_end_within_our_blocks_go_one_by_one(setup: Setup) -> None:
    """17 tokens each here, 16 there: from a block's beginning on both sides, of which there are few."""
    setup.store.stored = LAYOUT
    setup.store.go.set()
    mine = replace(LAYOUT, block_size_tokens=17)
    block_ids = offer_long(setup, 64, mine)
    await finished(setup)
    names = block_hashes(as_token_ids(range(64 * 17)), 16, root_hash(LAYOUT))
    assert [put.hashes for put in setup.store.puts] == [names[0:32], names[17:64], names[51:68]]
    assert [put.tokens[0] for put in setup.store.puts] == [0, 272, 816]
    assert [put.source.block_table[0] for put in setup.store.puts] == [block_ids[n] for n in (0, 16, 48)]
    assert [bool(put.extents) for put in setup.store.puts] == [True, False, False]


@pytest.mark.parametrize("error", [PeerLost("gone"), RuntimeError("bug")])
async def test_a_failure_frees(setup: Setup, error: Exception) -> None:
    setup.store.error = error
    setup.offer()
    setup.store.go.set()
    await finished(setup)
    assert setup.used_blocks == 0
    setup.offer()
    assert len(setup.leases) == 1, "a failure must give its place back"
    await finished(setup)


async def test_closed_before_it_began_it_frees(setup: Setup) -> None:
    setup.offer()
    await setup.background.close()
    assert setup.used_blocks == 0
    setup.leases.close()
    setup.offer()
    assert setup.used_blocks == 0
