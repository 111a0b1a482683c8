"""Several kv_stores behind prefill and decode, all with their real services and byte paths."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from sagellm_common.core.errors import KvExhausted
from sagellm_common.core.kv import Allocation
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, extents, ranked
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.store import kv_store, sees_the_store
from tests.support.topology_server import topology_server
from tests.support.waiting import eventually
from tests.support.workers import Worker, decode_all, generate, request, test_config, worker

SIZE = 4
PROMPT = [7 * i % 97 + 1 for i in range(3 * EXTENT_BLOCKS * SIZE + 10)]
STORES = ("kv_store-0", "kv_store-1", "kv_store-2")
FULL_BLOCKS = (len(PROMPT) + 7) // SIZE
"""Of the prompt and 7 of 8 generated tokens."""


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


def engine(block_size_tokens: int = SIZE) -> SimulatedEngine:
    return SimulatedEngine(
        num_blocks=512, block_size_tokens=block_size_tokens, context_length_tokens=2048, max_prefill_tokens=256
    )


@asynccontextmanager
async def pair(router: str, replicas: int, prefill_block_tokens: int = SIZE) -> AsyncIterator[tuple[Worker, Worker]]:
    config = test_config(f"kv_store.replicas={replicas}")
    mine = engine(prefill_block_tokens)
    async with (
        worker(WorkerRole.PREFILL, router, store=True, engine=mine, config=config) as prefill,
        worker(WorkerRole.DECODE, router, store=True, engine=engine(), config=config) as decode,
    ):
        yield prefill, decode


async def forget(*workers: Worker) -> None:
    for one in workers:
        await one.idle()  # what is pinned cannot be forgotten
        one.engine.kv.forget()


def expected_shares(worker: Worker, prompt: list[int], replicas: int) -> dict[str, int]:
    """Blocks by store, of a sequence whose hashes only `prompt` decides."""
    hashes = block_hashes(request(prompt).prompt_token_ids, SIZE, root_hash(worker.engine.kv.layout))
    shares = dict.fromkeys(STORES, 0)
    for extent in extents(hashes):
        for store_id in ranked(extent.key, STORES)[:replicas]:
            shares[store_id] += extent.num_blocks
    return shares


@pytest.mark.parametrize(("replicas", "prefill_block_tokens"), [(1, 4), (2, 4), (2, 8), (1, 3)])
async def test_a_prompt_is_kept_in_shards_and_comes_back_from_all_of_them(
    router: str, replicas: int, prefill_block_tokens: int
) -> None:
    async with AsyncExitStack() as stack:
        pools = {id: await stack.enter_async_context(kv_store(router, id)) for id in STORES}
        prefill, decode = await stack.enter_async_context(pair(router, replicas, prefill_block_tokens))
        await sees_the_store(prefill, decode, store_ids=STORES)
        wanted = request(PROMPT)
        first = await generate(prefill, decode, wanted)
        assert first.tokens == reference(PROMPT, wanted.sampling)[0]
        shares = expected_shares(decode, [*PROMPT, *first.tokens[:-1]], replicas)
        assert sum(shares.values()) == replicas * FULL_BLOCKS
        await eventually(
            lambda: {id: len(pool.cached_hashes()) for id, pool in pools.items()} == shares,
            lambda: f"{ {id: len(pool.cached_hashes()) for id, pool in pools.items()} } instead of {shares}",
        )
        await decode.idle()
        await forget(prefill)
        again = await generate(prefill, decode, request(PROMPT, request_id="r2"))
        assert again.tokens == first.tokens
        size = prefill_block_tokens
        # Extents of 128 tokens do not end with a block of 3: then it is what one store has from the beginning on.
        if EXTENT_BLOCKS * SIZE % size == 0:
            assert again.prefill.store_tokens == (len(PROMPT) - 1) // size * size
        else:
            assert again.prefill.store_tokens >= EXTENT_BLOCKS * SIZE // size * size
        assert sum(pool.pool.outcomes["hit"] for pool in pools.values()) >= again.prefill.store_tokens // SIZE
        await prefill.idle()
        await decode.idle()


@asynccontextmanager
async def filled(router: str, replicas: int) -> AsyncIterator[tuple[dict[str, AsyncExitStack], Worker, Worker]]:
    """Three stores, each in a stack of its own, that hold PROMPT; the workers have forgotten it."""
    async with AsyncExitStack() as stack:
        stores: dict[str, AsyncExitStack] = {}
        pools: list[HierarchyManager] = []
        for id in STORES:
            stores[id] = await stack.enter_async_context(AsyncExitStack())
            pools.append(await stores[id].enter_async_context(kv_store(router, id)))
        prefill, decode = await stack.enter_async_context(pair(router, replicas))
        await sees_the_store(prefill, decode, store_ids=STORES)
        await generate(prefill, decode, request(PROMPT))
        await eventually(lambda: sum(len(pool.cached_hashes()) for pool in pools) == replicas * FULL_BLOCKS)
        await decode.idle()
        depths = [pool.pool.cache[block].key.depth for pool in pools for block in pool.cached_hashes()]
        assert sorted(depths) == sorted([*range(FULL_BLOCKS)] * replicas), (
            "each knows where in the prompt its blocks are"
        )
        await forget(prefill, decode)
        yield stores, prefill, decode


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("gone", STORES)
async def test_with_two_replicas_the_loss_of_a_store_costs_no_hit(router: str, gone: str, known: bool) -> None:
    """Whether the workers know that it is gone or not."""
    async with filled(router, 2) as (stores, prefill, decode):
        stale = prefill.topology.snapshot()
        await stores[gone].aclose()
        if known:
            await sees_the_store(prefill, decode, store_ids=[id for id in STORES if id != gone])
        else:
            for one in (prefill, decode):
                one.topology.snapshot = lambda: stale  # type: ignore[method-assign]
        again = await generate(prefill, decode, request(PROMPT, request_id="r2"))
        assert again.tokens == reference(PROMPT, request(PROMPT).sampling)[0]
        assert again.prefill.store_tokens == (len(PROMPT) - 1) // SIZE * SIZE
        await prefill.idle()
        await decode.idle()


async def test_without_replicas_the_loss_of_a_store_costs_its_extents(router: str) -> None:
    async with filled(router, 1) as (stores, prefill, decode):
        hashes = block_hashes(request(PROMPT).prompt_token_ids, SIZE, root_hash(prefill.engine.kv.layout))
        owners = [ranked(extent.key, STORES)[0] for extent in extents(hashes)]
        gone = owners[1]
        await stores[gone].aclose()
        await sees_the_store(prefill, decode, store_ids=[id for id in STORES if id != gone])
        again = await generate(prefill, decode, request(PROMPT, request_id="r2"))
        assert again.tokens == reference(PROMPT, request(PROMPT).sampling)[0]
        assert again.prefill.store_tokens == owners.index(gone) * EXTENT_BLOCKS * SIZE
        await prefill.idle()
        await decode.idle()


async def test_decode_fetches_for_itself_what_no_prefill_worker_computes(router: str) -> None:
    """As the router plans it when the stores hold nearly all of a prompt: nothing is prefilled, nothing handed over."""
    async with filled(router, 2) as (_, prefill, decode):
        wanted = request(PROMPT, request_id="r2")
        steps = await decode_all(decode, wanted, [], None)
        assert [token for step in steps for token in step.token_ids] == reference(PROMPT, wanted.sampling)[0]
        report = steps[0].prompt_kv
        assert report is not None
        assert report.store_tokens == report.cached_tokens == (len(PROMPT) - 1) // SIZE * SIZE
        assert all(step.prompt_kv is None for step in steps[1:])
        await decode.idle()
        # Its own cache now; and after a lost worker, with what that had emitted.
        again = await decode_all(decode, request(PROMPT, request_id="r3"), [], None)
        assert again[0].prompt_kv is not None
        assert (again[0].prompt_kv.store_tokens, again[0].prompt_kv.cached_tokens) == (0, report.cached_tokens)
        await forget(decode)
        emitted = reference(PROMPT, wanted.sampling)[0][:3]
        resumed = await decode_all(decode, request(PROMPT, request_id="r4"), emitted, None)
        assert [token for step in resumed for token in step.token_ids] == reference(PROMPT, wanted.sampling)[0][3:]
        assert resumed[0].prompt_kv is not None
        assert resumed[0].prompt_kv.store_tokens > report.store_tokens
        await prefill.idle()
        await decode.idle()


async def test_without_memory_for_it_the_engine_decides(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for memory, as it does without a store."""
    async with filled(router, 1) as (_, _, decode):
        pool, refusals = decode.engine.kv, iter([KvExhausted("full")])

        def allocate(*args: object) -> Allocation:
            if refusal := next(refusals, None):
                raise refusal
            return type(pool).allocate(pool, *args)

        monkeypatch.setattr(pool, "allocate", allocate)
        wanted = request(PROMPT, request_id="r2")
        steps = await decode_all(decode, wanted, [], None)
        assert [token for step in steps for token in step.token_ids] == reference(PROMPT, wanted.sampling)[0]
        assert steps[0].prompt_kv is None
        await decode.idle()
