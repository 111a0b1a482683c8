"""The token oracle: what the cluster generates is what Hugging Face transformers generates on the same weights."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from sagellm_common.client.aio import AsyncClient, Completion
from sagellm_common.client.text import Tokenizer
from tests.support.checks import assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.oracle import continued, greedy

DEADLINE_S = 300.0
IN_FLIGHT = 8

TEXTS = (
    "Hi",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "List three colours of the rainbow:",
    "Q: What is 2 + 2?\nA:",
    "Zażółć gęślą jaźń – po polsku:",
    "東京は日本の首都です。では、",
    "Привет! Как дела сегодня?",
    "مرحبا بالعالم",
    "🦜🌊 emoji and ünïcödé 🤖",
    "\n\n\t  spaces   and\ttabs  ",
)
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 96, 127, 128, 129, 160, 200, 255, 256, 257, 300, 400)


def forty_prompts(tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Short, long, non-ASCII, one token, block-aligned and not (blocks have 16 tokens); some share their beginning."""
    rng = random.Random(7)
    texts = [tokenizer.encode(text).tolist() for text in TEXTS]
    flowing = tokenizer.encode(" ".join(rng.choices(" ".join(TEXTS[1:6]).split(), k=1000))).tolist()
    cut = [flowing[start : start + min(n, longest)] for start, n in enumerate(LENGTHS)]
    shared = [flowing[:64] + tail for tail in texts[:4]]
    prompts = texts + cut + shared
    assert len(prompts) == 40
    return prompts


async def complete_all(cluster: RunningCluster, prompts: Sequence[list[int]], max_tokens: int) -> list[Completion]:
    gate = asyncio.Semaphore(IN_FLIGHT)
    async with asyncio.timeout(DEADLINE_S), AsyncClient(cluster.router_address) as client:

        async def one(prompt: list[int]) -> Completion:
            async with gate:
                return await client.complete(prompt, max_tokens=max_tokens, ignore_eos=True)

        return list(await asyncio.gather(*(one(p) for p in prompts)))


async def check(cluster: RunningCluster, model: Path, max_tokens: int, longest: int, transport: str) -> None:
    """Twice: the second time prompts are found in the caches, where these are on."""
    prompts = forty_prompts(Tokenizer.from_dir(model), longest)
    expected: list[list[int]] = []
    for again in (False, True):
        done = await complete_all(cluster, prompts, max_tokens)
        found = [list(d.token_ids) for d in done]
        assert {len(tokens) for tokens in found} == {max_tokens}
        expected = expected or [continued(model, prompt, f) for prompt, f in zip(prompts, found, strict=True)]
        assert found == expected
        assert all(d.summary.attempts == 1 for d in done)
        if not again:
            assert all(d.summary.kv_bytes_transferred > 0 for d in done if d.summary.cached_tokens == 0)
            assert {d.summary.transport for d in done if d.summary.kv_bytes_transferred} == {transport}
    reused = sum(d.summary.cached_tokens for d in done)
    assert (reused > 0) == cluster.config.engine.prefix_caching
    await assert_nothing_leaked(cluster)


@pytest.mark.parametrize(
    ("prefill", "decode", "transport", "reuse"),
    [(2, 2, "tcp", True), (1, 1, "gloo", True), (1, 1, "shm", True), (1, 1, "tcp", False)],
)
async def test_the_tiny_llama(tiny_llama: Path, prefill: int, decode: int, transport: str, reuse: bool) -> None:
    settings = (
        f"transport.backend={transport}",
        f"engine.prefix_caching={str(reuse).lower()}",
        f"kv_store.enabled={str(reuse).lower()}",
        "engine.max_prefill_tokens=64",
    )
    with RunningCluster(*settings, num_prefill=prefill, num_decode=decode, model=tiny_llama) as cluster:
        await check(cluster, tiny_llama, 16, 400, transport)


async def test_the_tiny_qwen2(tiny_qwen2: Path) -> None:
    with RunningCluster(model=tiny_qwen2) as cluster:
        await check(cluster, tiny_qwen2, 16, 400, "tcp")


async def test_tokens_are_the_same_when_kv_is_pulled_while_it_is_computed(
    cluster: RunningCluster, tiny_llama: Path
) -> None:
    """Chunk by chunk and layer by layer; the last two again, with a prefix that both sides hold."""
    rng = random.Random(11)
    prompts = [[rng.randrange(3, 259) for _ in range(n)] for n in (161, 192, 260, 500)]
    prompts += [prompts[2] + prompts[0], prompts[3] + prompts[1]]
    done = [await complete_all(cluster, part, 16) for part in (prompts[:4], prompts[4:])]
    found = [one for part in done for one in part]
    assert [list(one.token_ids) for one in found] == [greedy(tiny_llama, prompt, 16) for prompt in prompts]
    async with AsyncClient(cluster.router_address) as client:
        for one in done[0]:
            events = {event.stage: event for event in (await client.explain(one.request_id)).events}
            assert "pull ahead" in events
            assert "before the first token" in events["transfer"].detail
    await assert_nothing_leaked(cluster)
