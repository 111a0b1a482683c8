"""kv_store behind prefill and decode, all three with their real services: what decode offloads, prefill fetches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.store import kv_store, sees_the_store
from tests.support.topology_server import topology_server
from tests.support.waiting import eventually
from tests.support.workers import Worker, generate, request, worker

PROMPT = list(range(1, 15))


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@asynccontextmanager
async def pair(router: str, prefill_block_tokens: int = 4) -> AsyncIterator[tuple[Worker, Worker]]:
    engine = SimulatedEngine(block_size_tokens=prefill_block_tokens)
    async with (
        worker(WorkerRole.PREFILL, router, store=True, engine=engine) as prefill,
        worker(WorkerRole.DECODE, router, store=True) as decode,
    ):
        yield prefill, decode


async def test_a_restarted_prefill_worker_is_served_from_the_store(router: str) -> None:
    async with kv_store(router) as pool, pair(router) as (prefill, decode):
        await sees_the_store(prefill, decode)
        first = await generate(prefill, decode, request(PROMPT, max_new_tokens=10))
        assert first.prefill.store_tokens == 0
        # 14 prompt tokens and 9 of 10 generated ones have KV: 23 tokens, 5 full blocks.
        await eventually(lambda: len(pool.cached_hashes()) == 5, lambda: f"{pool.get_utilization()}")
        await decode.idle()

        await prefill.idle()  # what is pinned cannot be forgotten
        prefill.engine.kv.forget()
        again = await generate(prefill, decode, request(PROMPT, max_new_tokens=10, request_id="r2"))
        assert (again.prefill.store_tokens, again.prefill.cached_tokens) == (12, 12)
        assert again.tokens == first.tokens == reference(PROMPT, request(PROMPT, max_new_tokens=10).sampling)[0]

        # The next turn of the conversation: what was generated is in the store, too.
        longer = [*PROMPT, *first.tokens, 42, 43]
        await prefill.idle()  # what is pinned cannot be forgotten
        prefill.engine.kv.forget()
        turn = await generate(prefill, decode, request(longer, request_id="r3"))
        assert turn.prefill.store_tokens == 20
        assert turn.tokens == reference(longer, request(longer).sampling)[0]
        await prefill.idle()
        await decode.idle()


async def test_local_blocks_are_not_fetched_again(router: str) -> None:
    async with kv_store(router) as pool, pair(router) as (prefill, decode):
        await sees_the_store(prefill, decode)
        await generate(prefill, decode, request(PROMPT))
        await eventually(lambda: len(pool.cached_hashes()) == 5)
        again = await generate(prefill, decode, request(PROMPT, request_id="r2"))
        assert (again.prefill.store_tokens, again.prefill.cached_tokens) == (0, 12)
        # Locally 3 blocks of the prompt, in the store also those that decode made.
        longer = [*PROMPT, *again.tokens, 42]
        more = await generate(prefill, decode, request(longer, request_id="r3"))
        assert (more.prefill.store_tokens, more.prefill.cached_tokens) == (8, 20)
        assert more.tokens == reference(longer, request(longer).sampling)[0]


async def test_one_token_is_left_to_compute_of_a_prompt_of_full_blocks(router: str) -> None:
    prompt = list(range(1, 17))
    async with kv_store(router) as pool, pair(router) as (prefill, decode):
        await sees_the_store(prefill, decode)
        await generate(prefill, decode, request(prompt))
        await eventually(lambda: len(pool.cached_hashes()) == 5)
        await prefill.idle()  # what is pinned cannot be forgotten
        prefill.engine.kv.forget()
        again = await generate(prefill, decode, request(prompt, request_id="r2"))
        assert again.prefill.store_tokens == 12
        assert again.tokens == reference(prompt, request(prompt).sampling)[0]


async def test_another_salt_finds_nothing(router: str) -> None:
    async with kv_store(router) as pool, pair(router) as (prefill, decode):
        await sees_the_store(prefill, decode)
        await generate(prefill, decode, request(PROMPT, cache_salt="a"))
        await eventually(lambda: len(pool.cached_hashes()) == 5)
        await prefill.idle()  # what is pinned cannot be forgotten
        prefill.engine.kv.forget()
        other = await generate(prefill, decode, request(PROMPT, request_id="r2", cache_salt="b"))
        assert other.prefill.store_tokens == 0


async def test_a_request_does_without_a_store_that_has_died(router: str) -> None:
    async with pair(router) as (prefill, decode):
        async with kv_store(router) as pool:
            await sees_the_store(prefill, decode)
            await generate(prefill, decode, request(PROMPT))
            await eventually(lambda: len(pool.cached_hashes()) == 5)
            await decode.idle()
            # Dead, and the workers do not know: their snapshots stay as they are.
            stale = prefill.topology.snapshot()
        for one in (prefill, decode):
            one.topology.snapshot = lambda: stale  # type: ignore[method-assign]
        await prefill.idle()  # what is pinned cannot be forgotten
        prefill.engine.kv.forget()
        for i in range(2):
            done = await generate(prefill, decode, request(PROMPT, request_id=f"later{i}"))
            assert done.tokens == reference(PROMPT, request(PROMPT).sampling)[0]
            assert done.prefill.store_tokens == 0
        await prefill.idle()
        await decode.idle()


async def test_corrupt_blocks_of_the_store_cost_the_hit_only(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes change between the store's digest and the engine: here, on their way through the receiver."""
    from sagellm_common.comm_backend.backends import socket_receiver
    from sagellm_common.core.errors import KvCorrupt

    def corrupt(*_: object) -> None:
        raise KvCorrupt("a block's digest does not match")

    async with kv_store(router) as pool, pair(router) as (prefill, decode):
        await sees_the_store(prefill, decode)
        await generate(prefill, decode, request(PROMPT))
        await eventually(lambda: len(pool.cached_hashes()) == 5)
        await decode.idle()
        await prefill.idle()  # what is pinned cannot be forgotten
        prefill.engine.kv.forget()
        with monkeypatch.context() as patch:
            patch.setattr(socket_receiver, "verify_digests", corrupt)
            # Prefill fetches and fails; decode reuses what it has but for the last block, which it cannot pull either.
            with pytest.raises(KvCorrupt):
                await generate(prefill, decode, request(PROMPT, request_id="r2"))
        await prefill.idle()
        await decode.idle()
        done = await generate(prefill, decode, request(PROMPT, request_id="r2"), attempt=2)
        assert done.tokens == reference(PROMPT, request(PROMPT).sampling)[0]


@pytest.mark.parametrize("size", [2, 3, 6, 8])
async def test_blocks_of_another_size_are_fetched_too(router: str, size: int) -> None:
    """The store has decode's blocks, of 4 tokens; prefill's are of `size`."""
    prompt = [7 * i % 97 + 1 for i in range(31)]
    async with kv_store(router) as pool, pair(router, size) as (prefill, decode):
        await sees_the_store(prefill, decode)
        await generate(prefill, decode, request(prompt, max_new_tokens=2))
        await eventually(lambda: len(pool.cached_hashes()) == 8, lambda: f"{pool.get_utilization()}")
        await decode.idle()
        await prefill.idle()
        prefill.engine.kv.forget()
        await generate(prefill, decode, request(prompt[:9], request_id="r2"))  # some of it is cached again
        await prefill.idle()
        again = await generate(prefill, decode, request(prompt, max_new_tokens=10, request_id="r3"))
        assert again.tokens == reference(prompt, request(prompt, max_new_tokens=10).sampling)[0]
        assert again.prefill.cached_tokens == min(30, 28) // size * size
        assert again.prefill.store_tokens == again.prefill.cached_tokens - 9 // size * size
        await prefill.idle()
        await decode.idle()


@pytest.mark.parametrize("size", [3, 6, 8])
async def test_a_decode_worker_of_other_blocks_offloads_too(router: str, size: int) -> None:
    """The store has the first decode worker's blocks, of 4 tokens; the second's are of `size`."""
    prompt = [7 * i % 97 + 1 for i in range(31)]
    async with kv_store(router) as pool, pair(router) as (prefill, decode):
        await sees_the_store(prefill, decode)
        await generate(prefill, decode, request(prompt[:9], max_new_tokens=2))
        await eventually(lambda: len(pool.cached_hashes()) == 2)
        engine = SimulatedEngine(block_size_tokens=size)
        async with worker(WorkerRole.DECODE, router, store=True, engine=engine, worker_id="decode-1") as other:
            await sees_the_store(other)
            await generate(prefill, other, request(prompt, max_new_tokens=2, request_id="r2"))
            # 32 tokens have KV: 30 are in full blocks of 3 and 6 tokens, and 28 of them in the store's.
            stored = 8 if size == 8 else 7
            await eventually(lambda: len(pool.cached_hashes()) == stored, lambda: f"{pool.get_utilization()}")
            await other.idle()
        await prefill.idle()
        prefill.engine.kv.forget()
        again = await generate(prefill, decode, request(prompt, max_new_tokens=10, request_id="r3"))
        assert again.tokens == reference(prompt, request(prompt, max_new_tokens=10).sampling)[0]
        assert again.prefill.store_tokens == 28
        await prefill.idle()
        await decode.idle()
