"""Stores that come, die and drain: what they keep moves by itself, and a prompt's hits stay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from sagellm_common.core.errors import Draining
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import BlockHash
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.prefix_reuse.sharding import extents, ranked
from services.kv_store import replication
from services.kv_store.extents import ExtentTable
from services.kv_store.loop import KvStore
from tests.integration.test_store_shards import FULL_BLOCKS, PROMPT, SIZE, STORES, forget, pair
from tests.support.simulated_engine import reference
from tests.support.store import kv_store, sees_the_store
from tests.support.topology_server import topology_server
from tests.support.waiting import eventually
from tests.support.workers import Worker, generate, request


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


class Stores:
    """Those of this process by id, each to be left by itself."""

    def __init__(self, stack: AsyncExitStack, router: str, replicas: int) -> None:
        self._stack, self._router, self._replicas = stack, router, replicas
        self._exits: dict[str, AsyncExitStack] = {}
        self.pools: dict[str, HierarchyManager] = {}

    async def start(self, *store_ids: str, drains: bool = False) -> None:
        for id in store_ids:
            self._exits[id] = await self._stack.enter_async_context(AsyncExitStack())
            store = kv_store(self._router, id, replicas=self._replicas, replicates=True, drains=drains)
            self.pools[id] = await self._exits[id].enter_async_context(store)

    async def stop(self, store_id: str) -> None:
        del self.pools[store_id]
        await self._exits.pop(store_id).aclose()

    async def hold(self, hashes: Sequence[BlockHash], replicas: int) -> None:
        """Returns once each extent is at all of its owners."""

        def lacking() -> Mapping[str, int]:
            found = dict.fromkeys(self.pools, 0)
            for extent in extents(hashes):
                for id in ranked(extent.key, self.pools)[:replicas]:
                    blocks = hashes[extent.first : extent.stop]
                    found[id] += len(blocks) - self.pools[id].lookup(blocks)
            return found

        await eventually(lambda: not any(lacking().values()), lambda: f"lacking: {lacking()}")


async def fill(prefill: Worker, decode: Worker, stores: Stores, replicas: int) -> list[BlockHash]:
    """PROMPT in the stores and nowhere else; its hashes and those of what was generated."""
    await sees_the_store(prefill, decode, store_ids=list(stores.pools))
    done = await generate(prefill, decode, request(PROMPT))
    tokens = request([*PROMPT, *done.tokens[:-1]]).prompt_token_ids
    hashes = block_hashes(tokens, SIZE, root_hash(decode.engine.kv.layout))
    assert len(hashes) == FULL_BLOCKS
    await stores.hold(hashes, replicas)
    await decode.idle()
    await forget(prefill, decode)
    return hashes


async def assert_all_hit(prefill: Worker, decode: Worker, stores: Stores) -> None:
    await sees_the_store(prefill, decode, store_ids=list(stores.pools))
    again = await generate(prefill, decode, request(PROMPT, request_id="again"))
    assert again.tokens == reference(PROMPT, request(PROMPT).sampling)[0]
    assert again.prefill.store_tokens == (len(PROMPT) - 1) // SIZE * SIZE
    await prefill.idle()
    await decode.idle()


async def test_a_store_that_joins_is_given_what_it_owns_now(router: str) -> None:
    async with AsyncExitStack() as stack:
        stores = Stores(stack, router, replicas=1)
        await stores.start(STORES[0])
        prefill, decode = await stack.enter_async_context(pair(router, 1))
        hashes = await fill(prefill, decode, stores, 1)
        await stores.start(*STORES[1:])
        await stores.hold(hashes, 1)
        await assert_all_hit(prefill, decode, stores)
        moved = {h for id in STORES[1:] for h in stores.pools[id].cached_hashes()}
        assert 0 < len(moved) < FULL_BLOCKS


async def test_a_store_that_does_not_answer_at_first_is_asked_again(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "RETRY_S", 0.01)
    answer, refused = KvStore.lookup_extents, list[str]()

    def refuse_once(store: KvStore, *asked: Any) -> list[int]:
        if not refused:
            refused.append(store.incarnation)
            raise Draining("not now")
        return answer(store, *asked)

    async with AsyncExitStack() as stack:
        stores = Stores(stack, router, replicas=2)
        await stores.start(*STORES[:2])
        prefill, decode = await stack.enter_async_context(pair(router, 2))
        hashes = await fill(prefill, decode, stores, 2)
        await stores.stop(STORES[1])
        monkeypatch.setattr(KvStore, "lookup_extents", refuse_once)
        await stores.start(STORES[1])
        await stores.hold(hashes, 2)
        assert refused


async def test_the_others_make_up_for_a_store_that_died(router: str) -> None:
    """Two replicas, two deaths, no hit lost."""
    async with AsyncExitStack() as stack:
        stores = Stores(stack, router, replicas=2)
        await stores.start(*STORES)
        prefill, decode = await stack.enter_async_context(pair(router, 2))
        hashes = await fill(prefill, decode, stores, 2)
        await stores.stop(STORES[1])
        await stores.hold(hashes, 2)
        await stores.stop(STORES[0])
        await assert_all_hit(prefill, decode, stores)


async def test_a_store_that_drains_gives_on_what_only_it_has(router: str) -> None:
    async with AsyncExitStack() as stack:
        stores = Stores(stack, router, replicas=1)
        await stores.start(*STORES, drains=True)
        prefill, decode = await stack.enter_async_context(pair(router, 1))
        hashes = await fill(prefill, decode, stores, 1)
        gone = ranked(hashes[0], STORES)[0]
        await stores.stop(gone)
        await stores.hold(hashes, 1)
        await assert_all_hit(prefill, decode, stores)


def test_the_table_knows_extents_as_far_as_the_pool_has_them() -> None:
    held = set(range(100))
    table = ExtentTable(lambda hashes: next((n for n, h in enumerate(hashes) if int(h) not in held), len(hashes)))
    hashes = [b"%d" % n for n in range(70)]
    table.learn(hashes, extents(hashes))
    table.learn([], extents(hashes))
    assert {key: len(blocks) for key, blocks in table.stored().items()} == {b"0": 32, b"32": 32, b"64": 6}
    held -= {0, 40}
    assert {key: len(blocks) for key, blocks in table.stored().items()} == {b"32": 8, b"64": 6}
    assert len(table) == 2
    # A tail without its beginning is of no use, until that is stored again.
    table.learn(hashes[3:32], extents(hashes, 3, 32))
    held.add(0)
    assert b"0" not in table.stored()


def test_the_table_does_not_outgrow_the_pool() -> None:
    table = ExtentTable(lambda hashes: len([h for h in hashes if h >= b"%09d" % 5000]))
    for n in range(6000):
        table.learn([b"%09d" % n], extents([b"%09d" % n]))
    assert len(table) < 2000
