"""The official OpenAI client against the real cluster: what the knobs do to real tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from sagellm_common.client.text import Tokenizer
from tests.support.cluster import RunningCluster
from tests.support.oracle import greedy, log_softmax

PROMPT = "Knobs and what they do to the tokens of a tiny model. "


@pytest.fixture
async def client(cluster: RunningCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.gateway_url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def complete(client: openai.AsyncOpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    options = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}} | options
    return await client.completions.create(model="tiny-llama", prompt=prompt, **options)


async def test_text_token_ids_and_stream_give_the_same(client: openai.AsyncOpenAI, tiny_llama: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_llama)
    ids = tokenizer.encode(PROMPT).tolist()
    expected = tokenizer.decode(greedy(tiny_llama, ids, 12))
    by_text, by_ids = await complete(client), await complete(client, prompt=ids)
    assert by_text.choices[0].text == by_ids.choices[0].text == expected
    assert by_text.usage.prompt_tokens == len(ids)
    assert by_text.usage.completion_tokens == 12
    assert by_ids.usage.prompt_tokens_details.cached_tokens >= 32  # the first one left them
    stream = await complete(client, stream=True)
    chunks = [chunk.choices[0].text async for chunk in stream]
    assert "".join(chunks) == expected
    assert len([chunk for chunk in chunks if chunk]) > 3


async def test_logprobs_are_the_models_at_every_token(client: openai.AsyncOpenAI, tiny_llama: Path) -> None:
    """The first token's come from prefill, the others' from decode."""
    tokenizer = Tokenizer.from_dir(tiny_llama)
    ids = tokenizer.encode(PROMPT).tolist()
    answer = await complete(client, prompt=ids, logprobs=3)
    tokens = greedy(tiny_llama, ids, 12)
    found = answer.choices[0].logprobs
    assert len(found.token_logprobs) == len(found.top_logprobs) == 12
    for i, (token, logprob) in enumerate(zip(tokens, found.token_logprobs, strict=True)):
        expected = log_softmax(tiny_llama, ids + tokens[:i])
        assert logprob == pytest.approx(expected[token], abs=1e-3)
        top = sorted(found.top_logprobs[i].values(), reverse=True)
        assert top[0] == pytest.approx(max(expected), abs=1e-3)
        # This format is keyed by text, and half characters all look alike: some of the three may hide each other.
        assert all(min(abs(value - e) for e in sorted(expected)[-3:]) < 1e-3 for value in top)


async def test_seeds_n_and_sampling(client: openai.AsyncOpenAI) -> None:
    sampled = {"temperature": 1.0, "seed": 5, "extra_body": {"ignore_eos": True, "top_k": 50, "min_p": 0.01}}
    one, again = await complete(client, **sampled), await complete(client, **sampled)
    assert one.choices[0].text == again.choices[0].text
    three = await complete(client, n=3, **sampled)
    texts = [choice.text for choice in sorted(three.choices, key=lambda c: c.index)]
    assert texts[0] == one.choices[0].text
    assert len(set(texts)) == 3


async def test_stop_strings_and_lengths(client: openai.AsyncOpenAI) -> None:
    whole = (await complete(client, max_tokens=20)).choices[0].text
    stop = whole[6:8]
    cut = (await complete(client, max_tokens=20, stop=[stop, "never there"])).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    chat = await client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=1,
        extra_body={"ignore_eos": True},
    )
    assert chat.choices[0].finish_reason == "length"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 1
