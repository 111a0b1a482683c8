"""The real model end to end: SmolLM2-135M over 1P1D, through the OpenAI client and against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.test_token_equality import check
from tests.support.checks import all_serving, assert_nothing_leaked
from tests.support.cluster import RunningCluster

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence. " * 4}]


@pytest.fixture(scope="module")
def smol_cluster(smollm2: Path) -> Iterator[RunningCluster]:
    with RunningCluster("engine.num_blocks=320", "kv_store.budget_bytes=400000000", model=smollm2) as cluster:
        yield cluster


async def test_a_chat_streams_word_by_word_and_is_served_from_the_store_after_a_restart(
    smol_cluster: RunningCluster,
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{smol_cluster.gateway_url}/v1", api_key="none") as client:

        async def ask() -> tuple[str, int, dict[str, int]]:
            text, chunks = "", 0
            stream = await client.chat.completions.create(
                model="SmolLM2-135M-Instruct",
                messages=QUESTION,
                temperature=0,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    chunks += 1
            assert chunk.model_extra is not None
            return text, chunks, chunk.model_extra["sagellm"]

        text, chunks, happened = await ask()
        assert "Paris" in text
        assert chunks > 3
        assert happened["kv_bytes_transferred"] > 0
        assert happened["store_tokens"] == 0
        await assert_nothing_leaked(smol_cluster)  # the offload is through
        await asyncio.to_thread(smol_cluster.restart, "prefill-0")
        await all_serving(smol_cluster)
        again, _, happened = await ask()
        assert again == text
        assert happened["store_tokens"] >= 32


@pytest.mark.timeout(300)  # computes a few thousand tokens, with the oracle as busy as the cluster
async def test_forty_prompts_equal_transformers(smol_cluster: RunningCluster, smollm2: Path) -> None:
    await check(smol_cluster, smollm2, 8, 130, "tcp")
