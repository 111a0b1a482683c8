"""The engine short of KV blocks, under every eviction policy, changed while sequences run: the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sagellm_common.core.kv import BlockEvent
from sagellm_common.kv_policy.eviction import EVICTION
from tests.support.engines import prompts, running_engine
from tests.support.oracle import greedy

NUM_BLOCKS, BLOCK_TOKENS, NEW_TOKENS = 14, 16, 6


async def test_tokens_are_those_of_a_roomy_pool(tiny_llama: Path) -> None:
    """Four documents of four blocks, asked about in turn, with a pool for not even three of them and one sequence."""
    documents = prompts(seed=1, lengths=(64, 64, 64, 64))
    questions = [documents[n % 4] + tail for n, tail in enumerate(prompts(seed=2, lengths=(3, 17, 5, 30, 9, 1)))]
    expected = [greedy(tiny_llama, question, NEW_TOKENS) for question in questions]
    events: list[BlockEvent] = []
    async with running_engine(tiny_llama, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_TOKENS) as driver:
        pool = driver.engine.kv
        assert pool.eviction == "adaptive"
        pool.watch(events.append)
        for name in EVICTION:
            evicted = sum(len(event.removed) for event in events)
            runs = [asyncio.create_task(driver.run(question, NEW_TOKENS)) for question in questions]
            await asyncio.sleep(0)
            pool.set_eviction(name)
            assert [tokens for tokens, _ in await asyncio.gather(*runs)] == expected, name
            assert sum(len(event.removed) for event in events) > evicted, name
            assert pool.get_utilization().balanced
