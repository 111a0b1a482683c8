from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.types import BlockHash, KvLayout, KvSource, TokenIds, as_token_ids
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.store_client import PutResult
from services.decode.offload import MAX_CONCURRENT, MAX_POOL_SHARE, Offloader
from tests.support.simulated_engine import SimulatedPool
from tests.support.topology import LAYOUT, make_record
from tests.support.waiting import eventually

TOKENS = as_token_ids(range(40))
BLOCKS = 32


class FakeStore:
    def __init__(self) -> None:
        self.available = True
        self.present = 0
        self.stored: KvLayout | None = None
        self.go = asyncio.Event()
        self.puts: list[tuple[list[BlockHash], list[int], KvSource]] = []
        self.error: Exception | None = None
        self.under_way = 0

    async def layout(self) -> KvLayout | None:
        return self.stored

    async def lookup(self, hashes: Sequence[BlockHash], layout: KvLayout) -> int:
        self.under_way += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return self.present

    async def put(
        self, hashes: Sequence[BlockHash], token_ids: TokenIds, source: KvSource, layout: KvLayout, *, timeout_s: float
    ) -> PutResult:
        self.puts.append((list(hashes), token_ids.tolist(), source))
        return PutResult(len(hashes), 0, 0)


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
            self.offloader.offer(request_id, 1, TOKENS, "", blocks)
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
    ((hashes, tokens, source),) = setup.store.puts
    assert hashes == block_hashes(TOKENS[:32], 16, root_hash(LAYOUT))
    assert tokens == list(range(32))
    assert (len(source.block_table), source.num_tokens) == (2, 32)
    assert setup.used_blocks == 0
    assert len(setup.leases) == 0


async def test_what_the_store_has_is_not_sent(setup: Setup) -> None:
    setup.store.go.set()
    setup.store.present = 2
    setup.offer()
    await finished(setup)
    assert setup.store.puts == []
    setup.store.present = 1
    block_ids = setup.offer()
    await finished(setup)
    ((hashes, tokens, source),) = setup.store.puts
    assert hashes == block_hashes(TOKENS, 16, root_hash(LAYOUT))[1:2]
    assert tokens == list(range(16, 32))
    assert source.block_table.tolist() == block_ids[1:2]


@pytest.mark.parametrize(
    ("size", "present", "first_hash", "first_block"), [(8, 1, 0, 0), (8, 3, 2, 1), (32, 0, 0, 0), (24, 0, 0, 0)]
)
async def test_a_store_of_other_blocks_is_offered_its_own(
    setup: Setup, size: int, present: int, first_hash: int, first_block: int
) -> None:
    """Hashed as it has them, and from where a block begins on both sides."""
    setup.store.stored = replace(LAYOUT, block_size_tokens=size, dtype="bfloat16")
    setup.store.present = present
    setup.store.go.set()
    block_ids = setup.offer()
    await finished(setup)
    ((hashes, tokens, source),) = setup.store.puts
    full = 32 // size * size
    assert hashes == block_hashes(TOKENS[:full], size, root_hash(setup.store.stored))[first_hash:]
    assert tokens == list(range(first_hash * size, full))
    assert source.block_table.tolist() == block_ids[first_block:2]


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
    assert [len(hashes) for hashes, _, _ in setup.store.puts] == [BLOCKS]


async def test_the_same_request_id_again_is_another_transfer(setup: Setup) -> None:
    setup.offer("r1")
    setup.offer("r1")
    assert len(setup.leases) == 2
    setup.store.go.set()
    await finished(setup)
    assert setup.used_blocks == 0


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
