"""A prompt's KV out of another worker's cache: nothing is computed that a worker holds, whoever that is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np
import pytest

from sagellm_common.core.errors import Draining, InvalidRequest, LayoutMismatch
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import KvPeer, WorkerRole
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.kv_transfer_client import KvTransferClient
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.store import kv_store
from tests.support.topology import LAYOUT
from tests.support.topology_server import topology_server
from tests.support.workers import Worker, generate, request, worker

PROMPT = list(range(1, 15))


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


def peer(of: Worker, cached_tokens: int = 1000) -> KvPeer:
    record = of.runtime.record
    return KvPeer(record.worker_id, record.incarnation, record.address, cached_tokens)


async def idle(*workers: Worker) -> None:
    for one in workers:
        await one.idle()


@pytest.mark.parametrize("prefill_block_tokens", [4, 8, 3])
async def test_the_next_turn_comes_from_where_it_was_generated(router: str, prefill_block_tokens: int) -> None:
    engine = SimulatedEngine(block_size_tokens=prefill_block_tokens)
    async with (
        worker(WorkerRole.PREFILL, router, engine=engine) as prefill,
        worker(WorkerRole.DECODE, router) as decode,
    ):
        first = await generate(prefill, decode, request(PROMPT, max_new_tokens=10))
        longer = [*PROMPT, *first.tokens, 42, 43]
        await idle(prefill, decode)
        turn = await generate(prefill, decode, request(longer, request_id="r2"), peer=peer(decode))
        assert turn.tokens == reference(longer, request(longer).sampling)[0]
        # Decode has 23 tokens, 20 of them in full blocks; prefill its blocks of 14.
        own = len(PROMPT) // prefill_block_tokens * prefill_block_tokens
        reached = 20 // prefill_block_tokens * prefill_block_tokens
        assert (turn.prefill.cached_tokens, turn.prefill.store_tokens) == (reached, 0)
        assert turn.prefill.origins.peer_tokens == reached - own > 0
        await idle(prefill, decode)
        assert decode.leases.outcomes["committed"] == 1


async def test_one_prefill_worker_has_what_another_has_computed(router: str) -> None:
    async with (
        worker(WorkerRole.PREFILL, router) as prefill,
        worker(WorkerRole.PREFILL, router, worker_id="prefill-1") as other,
        worker(WorkerRole.DECODE, router) as decode,
    ):
        await generate(prefill, decode, request(PROMPT))
        again = await generate(other, decode, request(PROMPT, request_id="r2"), peer=peer(prefill, 8))
        assert again.prefill.origins.peer_tokens == 8, "no more is asked for than the plan says"
        salted = request(PROMPT, request_id="r3", cache_salt="another tenant's")
        assert (await generate(other, decode, salted, peer=peer(prefill))).prefill.cached_tokens == 0
        await idle(prefill, other, decode)


async def test_what_is_gone_or_dead_costs_the_hits_alone(router: str) -> None:
    async with AsyncExitStack() as stack, worker(WorkerRole.PREFILL, router) as prefill:
        leaving = await stack.enter_async_context(worker(WorkerRole.DECODE, router, worker_id="decode-1"))
        async with worker(WorkerRole.DECODE, router) as decode:
            expected = reference(PROMPT, request(PROMPT).sampling)[0]
            nothing = await generate(prefill, decode, request(PROMPT), peer=peer(leaving))
            assert (nothing.tokens, nothing.prefill.cached_tokens) == (expected, 0)
            known = peer(leaving)
            await stack.aclose()
            for n in range(2):  # the second one does not try
                await prefill.idle()
                prefill.engine.kv.forget()
                again = await generate(prefill, decode, request(PROMPT, request_id=f"r{n}"), peer=known)
                assert (again.tokens, again.prefill.cached_tokens) == (expected, 0)
            await idle(prefill, decode)


async def test_who_lends_to_whom(router: str) -> None:
    async with worker(WorkerRole.DECODE, router) as decode, kv_store(router) as store, ChannelPool() as channels:
        tokens, client = np.array(PROMPT, np.int32), KvTransferClient(channels)

        async def ask(whom: KvPeer, **more: object) -> object:
            how = {"worker_id": "me", "layout": decode.engine.kv.layout, "backend": "tcp", "timeout_s": 5.0} | more
            return await client.lend_cached(whom, tokens, "", **how)  # type: ignore[arg-type]

        assert await ask(peer(decode)) is None
        with pytest.raises(LayoutMismatch):
            await ask(peer(decode), layout=LAYOUT)
        (keeper,) = [w for w in decode.topology.snapshot().workers if w.role is WorkerRole.KV_STORE]
        with pytest.raises(InvalidRequest, match="lends no cached blocks"):
            await ask(KvPeer(keeper.worker_id, keeper.incarnation, keeper.address, 8))
        assert store.get_utilization().used_blocks == 0
        await decode.runtime.drain(0.0)
        with pytest.raises(Draining):
            await ask(peer(decode))
