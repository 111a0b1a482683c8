"""Prefill and decode workers that keep KV differently: blocks of other sizes and numbers, other numbers of ranks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sagellm_common.client.text import Tokenizer
from tests.integration.test_token_equality import complete_all, forty_prompts
from tests.support.checks import assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.engines import running_engine

NEW_TOKENS = 8


async def test_tokens_equal_the_single_engine(tiny_llama: Path) -> None:
    prompts = forty_prompts(Tokenizer.from_dir(tiny_llama), 400)[3::10]
    async with running_engine(tiny_llama, kv_quant_bits=4, prefix_caching=False) as driver:
        expected = [(await driver.run(prompt, NEW_TOKENS))[0] for prompt in prompts]
    settings = (
        "engine.kv_quant_bits=4",
        "engine.max_prefill_tokens=96",
        "prefill.block_size_tokens=32",
        "prefill.tensor_parallel=2",
        "decode.block_size_tokens=24",
        "decode.num_blocks=200",
    )
    with RunningCluster(*settings, model=tiny_llama) as cluster:
        first, again = [await complete_all(cluster, prompts, NEW_TOKENS) for _ in range(2)]
        for done in (first, again):
            assert [list(d.token_ids) for d in done] == expected
            assert {d.summary.attempts for d in done} == {1}
        moved = [sum(d.summary.kv_bytes_transferred for d in done) for done in (first, again)]
        assert 0 < moved[1] < moved[0]  # decode holds the full blocks of its size from the first time
        for prompt, done in zip(prompts, again, strict=True):
            assert done.summary.cached_tokens == (len(prompt) - 1) // 32 * 32
        await assert_nothing_leaked(cluster)
        assert "LayoutMismatch" not in await asyncio.to_thread(cluster.log, "prefill-0")
