"""A repeated prompt is served from the store after the prefill worker, and its cache with it, was restarted."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.integration.test_token_equality import complete_all
from tests.support.checks import all_serving, assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.kv_channels import missing
from tests.support.oracle import greedy


@pytest.mark.parametrize("transport", ["tcp", "mooncake"])
async def test_prompts_outlive_the_worker_that_computed_them(tiny_llama: Path, transport: str) -> None:
    if why := missing(transport):
        pytest.skip(why)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 250) for _ in range(n)] for n in (15, 16, 32, 64, 65, 100)]
    expected = [greedy(tiny_llama, prompt, 12) for prompt in prompts]
    with RunningCluster(f"transport.backend={transport}", model=tiny_llama) as cluster:
        done = await complete_all(cluster, prompts, 12)
        assert [list(d.token_ids) for d in done] == expected
        assert [d.summary.store_tokens for d in done] == [0] * len(prompts)
        await assert_nothing_leaked(cluster)  # the offloads are through
        await asyncio.to_thread(cluster.restart, "prefill-0")
        await all_serving(cluster)
        done = await complete_all(cluster, prompts, 12)
        assert [list(d.token_ids) for d in done] == expected
        # Whole blocks of 16, and one token at least is computed.
        assert [d.summary.store_tokens for d in done] == [0, 0, 16, 48, 64, 96]
        await assert_nothing_leaked(cluster)
