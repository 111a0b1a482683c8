"""Blocks moved under sequences that run: the same tokens, wherever their KV lies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.core.kv import BlockMoves
from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy.kv_manager import LmdeployKvPool
from sagellm_common.kv_runtime.integrity import check
from tests.support.engines import prompts, running_engine
from tests.support.oracle import greedy

NUM_BLOCKS, BLOCK_TOKENS, NEW_TOKENS = 40, 4, 16


class Shuffled:
    """After each step all blocks that may move go to the other end of the free ones, and back after the next."""

    def __init__(self, pool: LmdeployKvPool) -> None:
        self.pool = pool
        self.moved_running = 0
        self.moved_leased = 0
        self.steps = pool.between_steps
        pool.between_steps = self.between_steps  # type: ignore[method-assign]

    def between_steps(self) -> None:
        pool = self.pool
        free, pinned = pool.slot_map()
        sources, destinations = np.flatnonzero(~free), np.flatnonzero(free)[::-1]
        count = min(len(sources), len(destinations))
        running = [seq.logical_blocks.get_real_blocks() for seq in pool._scheduler.running]
        tables = np.concatenate([np.empty(0, np.int64), *running])
        before = pool.blocks.slots(tables)
        pool.migrate(BlockMoves(sources[:count].astype(np.int32), destinations[:count].astype(np.int32)))
        self.moved_running += int(np.count_nonzero(before != pool.blocks.slots(tables)))
        self.moved_leased += int(np.count_nonzero(pool.slot_map()[0] & pinned))


async def test_tokens_are_the_same_while_blocks_of_running_sequences_move_after_each_step(tiny_llama: Path) -> None:
    asked = prompts(seed=3, lengths=(9, 17, 30))
    expected = [greedy(tiny_llama, prompt, NEW_TOKENS) for prompt in asked]
    async with running_engine(tiny_llama, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_TOKENS) as driver:
        pool = driver.engine.kv
        assert isinstance(pool, LmdeployKvPool)
        leased = pool.allocate(as_token_ids(asked[1]), 8, "somebody else's")
        pool.regions().block(int(leased.block_ids[0]))[:] = bytes([7]) * pool.layout.block_bytes
        shuffled = Shuffled(pool)
        found = await asyncio.gather(*(driver.run(prompt, NEW_TOKENS) for prompt in asked))
        assert [tokens for tokens, _ in found] == expected
        assert shuffled.moved_running > 4 * NEW_TOKENS
        assert shuffled.moved_leased == 0
        assert set(pool.regions().block(int(leased.block_ids[0]))) == {7}
        # What is cached was moved, too, and is found.
        again, _ = await driver.run(asked[2], NEW_TOKENS)
        assert again == expected[2]
        pool.free(leased)
        assert check(pool, pool.cached_hashes()).problems == ()


async def test_what_is_asked_for_during_a_step_is_done_after_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(seed=4, lengths=(20,))[0]
    async with running_engine(tiny_llama, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_TOKENS) as driver:
        pool = driver.engine.kv
        assert isinstance(pool, LmdeployKvPool)
        await driver.run(prompt, 1)  # leaves cached blocks
        cached = pool.blocks.slots(pool.cache.blocks())[:2].astype(np.int32)
        assert pool.migrate(BlockMoves(cached, np.array([20, 30], np.int32))) == 2
        gaps = pool.get_fragmentation().external
        with monkeypatch.context() as patch:
            patch.setattr(pool._scheduler, "num_locked", lambda: 1)
            before = pool.moved_blocks
            assert pool.defragment(8 * pool.layout.block_bytes) == 0
        assert pool.moved_blocks == before
        assert (await driver.run(prompt, NEW_TOKENS))[0] == greedy(tiny_llama, prompt, NEW_TOKENS)
        assert pool.moved_blocks > before
        while pool.defragment(8 * pool.layout.block_bytes):
            pass
        assert pool.get_fragmentation().external < gaps
