"""Host memory below LMDeploy's KV cache: an evicted prompt comes back, and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.types import as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.lmdeploy.kv_manager import LmdeployKvPool
from tests.support.engines import Driver, engine_config, prompts
from tests.support.oracle import greedy

NEW_TOKENS = 6


async def answered(driver: Driver, tokens: list[int]) -> tuple[list[int], int]:
    """As prefill does it: allocate, then compute the rest; the tokens, and how many of the prompt's were there."""
    allocation = driver.engine.kv.allocate(as_token_ids(tokens), len(tokens))
    cached = allocation.num_cached_tokens
    found, _ = await driver.run(tokens, NEW_TOKENS, request={"allocation": allocation})
    return found, cached


@pytest.mark.parametrize("bits", [0, 8])
async def test_an_evicted_prompt_comes_back_and_says_the_same(tiny_llama: Path, bits: int) -> None:
    asked = prompts(7, (65, 70, 66))
    engine = engine_config(tiny_llama, num_blocks=8, kv_quant_bits=bits)
    config = Config.model_validate(engine.model_dump() | {"kv": {"host_budget_bytes": 16 << 20}})
    driver = Driver(make_engine(config))
    await driver.engine.start(driver.on_step)
    try:
        assert isinstance(driver.engine.kv, LmdeployKvPool)
        first = [await answered(driver, tokens) for tokens in asked]
        assert [cached for _, cached in first] == [0, 0, 0]
        again = [await answered(driver, tokens) for tokens in asked]
        # Each prompt takes five or more of the eight blocks: most of it was evicted for the others.
        assert [cached for _, cached in again] == [64, 64, 64]
        assert [tokens for tokens, _ in again] == [tokens for tokens, _ in first]
        if not bits:  # else it is not the single engine's arithmetic
            assert [tokens for tokens, _ in again] == [greedy(tiny_llama, prompt, NEW_TOKENS) for prompt in asked]
        (host,) = driver.engine.kv.get_utilization().tiers
        assert host.hit_blocks >= 6
        assert driver.engine.kv.get_utilization().balanced
        assert driver.engine.kv.get_utilization().used_blocks == 0
    finally:
        await driver.engine.close()
