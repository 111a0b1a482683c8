"""Router, prefill, decode and store with their real services around simulated engines, in which wrong KV is a wrong
token: whatever the index, a worker or the store believes wrongly costs a computation, never a token."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import pytest
import xxhash
from prometheus_client import CollectorRegistry

from sagellm_common.core.config import Config
from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import BlockHash, SamplingParams, TokenIds, WorkerRole, as_token_ids
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.prefix_reuse import hashing
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from services.router import pipeline
from services.router.__main__ import serving
from services.router.observed import RouterMetrics
from tests.support.router_harness import Generated, RouterHarness
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.store import kv_store, sees_the_store
from tests.support.waiting import eventually
from tests.support.workers import Worker, worker

SIZE = 4
PROMPT = list(range(1, 20))
GREEDY_6 = SamplingParams(max_new_tokens=6)


@dataclass(slots=True)
class Lab:
    router: RouterHarness
    prefill: Worker
    decode: Worker
    store: HierarchyManager

    async def generate(self, prompt: Sequence[int], name: str, cache_salt: str = "") -> Generated:
        """Checks the tokens."""
        done = await self.router.generate(prompt, request_id=name, model="simulated", cache_salt=cache_salt)
        assert done.tokens == reference(list(prompt), GREEDY_6)[0], f"wrong tokens for {prompt}"
        return done

    async def idle(self) -> None:
        await self.prefill.idle()
        await self.decode.idle()

    def hashes(self, prompt: Sequence[int], cache_salt: str = "") -> list[BlockHash]:
        return block_hashes(as_token_ids(prompt), SIZE, root_hash(self.prefill.engine.kv.layout, cache_salt))

    def matched(self, prompt: Sequence[int], cache_salt: str = "") -> dict[str, int]:
        return self.router.router.workers.matched(b"".join(self.hashes(prompt, cache_salt)), SIZE)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    topology, registry = EmbeddedTopology(), CollectorRegistry()
    async with (
        serving(Config(), topology, metrics=RouterMetrics(registry)) as running,
        grpc.aio.insecure_channel(running.address, options=[("grpc.enable_http_proxy", 0)]) as channel,
        kv_store(running.address) as store,
        worker(WorkerRole.PREFILL, running.address, store=True, engine=SimulatedEngine(num_blocks=48)) as prefill,
        worker(WorkerRole.DECODE, running.address, store=True, engine=SimulatedEngine(num_blocks=48)) as decode,
    ):
        harness = RouterHarness(topology, running, channel, registry)
        await sees_the_store(prefill, decode)
        await eventually(lambda: len(running.workers._links) == 3)
        await eventually(lambda: all(link.usable for link in running.workers._links.values()))
        yield Lab(harness, prefill, decode, store)


def weak_hashes(token_ids: TokenIds, block_size_tokens: int, root: BlockHash) -> bytes:
    """One of sixteen names for every block there may be."""
    packed, step = token_ids.astype("<i4", copy=False).tobytes(), 4 * block_size_tokens
    parent, hashes = root, []
    for start in range(0, len(packed) - step + 1, step):
        parent = bytes([xxhash.xxh3_64_digest(parent + packed[start : start + step])[0] % 16]) * 16
        hashes.append(parent)
    return b"".join(hashes)


def forget(*workers: Worker, keep: int = 0) -> None:
    """All of their cached blocks but the first so many."""
    for one in workers:
        with one.engine.kv.lock:
            one.engine.kv.cache.remove(one.engine.kv.cache.hashes()[keep:])


async def test_blocks_of_one_name_are_told_apart(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the workers and in the store, which is asked for blocks from the middle of a prompt, too."""
    for module in (hashing, pipeline):
        monkeypatch.setattr(module, "packed_block_hashes", weak_hashes)
    rng = random.Random(5)
    blocks = [[rng.randrange(1, 900) for _ in range(SIZE)] for _ in range(6)]
    reused = from_store = 0
    for turn in range(60):
        prompt = [token for _ in range(rng.randrange(1, 6)) for token in rng.choice(blocks)] + [turn % 3]
        done = await lab.generate(prompt, f"r{turn}")
        reused += done.summary.cached_tokens
        from_store += done.summary.store_tokens
        await lab.idle()
        forget(lab.prefill, keep=1)  # the rest of a prompt the store has
    for cache in (lab.prefill.engine.kv.cache, lab.decode.engine.kv.cache, lab.store.pool.cache):
        assert cache.matcher.rejected > 0, "no name was ever another block's"
    assert reused > 0 and from_store > 0
    await lab.idle()


async def test_blocks_from_the_middle_of_a_prompt_are_told_from_those_of_another(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has a block of that name, with these tokens, whose parent has the right name: but it came after other
    tokens than those that the worker has of the prompt."""
    for module in (hashing, pipeline):
        monkeypatch.setattr(module, "packed_block_hashes", weak_hashes)
    first = [1, 2, 3, 4]
    another = next(p for n in range(2, 900) if lab.hashes(p := [n, 2, 3, 4]) == lab.hashes(first))
    middle = next(p for n in range(2, 900) if len({*lab.hashes([*first, *(p := [n, 6, 7, 8])])}) == 2)
    await lab.generate([*first, *middle, 9], "r1")
    await lab.idle()
    assert lab.store.lookup(lab.hashes([*first, *middle])) == 2
    forget(lab.prefill, lab.decode)
    assert (await lab.generate([*another, 9], "r2")).summary.cached_tokens == 0
    await lab.idle()
    done = await lab.generate([*another, *middle, 9], "r3")
    assert (done.summary.cached_tokens, done.summary.store_tokens) == (4, 0)
    await lab.idle()
    assert lab.store.pool.cache.matcher.rejected == 2  # once for each prompt of the other
    forget(lab.prefill, lab.decode)
    assert (await lab.generate([*first, *middle, 9], "r4")).summary.store_tokens == 8
    await lab.idle()


async def test_a_worker_that_announces_what_it_does_not_hold_computes_it(lab: Lab) -> None:
    lab.prefill.runtime.journal._on_event(BlockEvent(stored=tuple(lab.hashes(PROMPT))))
    lab.decode.runtime.journal._on_event(BlockEvent(stored=tuple(lab.hashes(PROMPT))))
    await eventually(lambda: lab.matched(PROMPT) == {"prefill-0": 16, "decode-0": 16})
    done = await lab.generate(PROMPT, "r1")
    assert (done.summary.cached_tokens, done.summary.store_tokens) == (0, 0)
    assert (await lab.generate(PROMPT, "r2")).summary.cached_tokens == 16
    await lab.idle()


async def test_a_store_that_holds_other_tokens_under_a_name_is_a_miss(lab: Lab) -> None:
    lab.store.adopt(lab.prefill.engine.kv.layout)
    put = lab.store.begin_put(lab.hashes(PROMPT), as_token_ids([7] * 16))
    lab.store.commit_put(put)
    await eventually(lambda: lab.matched(PROMPT) == {"kv_store-0": 16})
    done = await lab.generate(PROMPT, "r1")
    assert done.summary.store_tokens == 0
    await lab.idle()


async def test_tenants_do_not_share_what_they_cached(lab: Lab) -> None:
    await lab.generate(PROMPT, "a1", cache_salt="a")
    await lab.idle()
    await eventually(lambda: "kv_store-0" in lab.matched(PROMPT, "a"))
    assert lab.matched(PROMPT, "b") == lab.matched(PROMPT) == {}
    for name, salt in (("b1", "b"), ("n1", "")):
        other = await lab.generate(PROMPT, name, cache_salt=salt)
        assert (other.summary.cached_tokens, other.summary.store_tokens) == (0, 0)
    assert (await lab.generate(PROMPT, "a2", cache_salt="a")).summary.cached_tokens == 16
    await lab.idle()
