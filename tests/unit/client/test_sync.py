from __future__ import annotations

import asyncio

import pytest

from sagellm_common.client import Client
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.errors import QueueFull


@pytest.fixture
def tokenizer(tokenizer_dir):
    return Tokenizer.from_dir(tokenizer_dir)


async def test_the_same_calls_without_a_loop(router, tokenizer):
    router.script.reply = tokenizer.encode("hello wörld").tolist()

    def use() -> None:
        with Client(router.address) as client:
            assert client.complete("hi").text == "hello wörld"
            outputs = list(client.chat([{"role": "user", "content": "hi"}]))
            assert "".join(o.text for o in outputs) == "hello wörld"
            assert client.models()[0].name == "tiny"
            assert client.topology().backend == "embedded"
            assert client.explain(outputs[0].request_id).plan.strategy == "fifo"
            client.cancel("nobody")

    await asyncio.to_thread(use)


async def test_leaving_the_loop_cancels_the_call(router, tokenizer):
    router.script.reply = tokenizer.encode("hello wörld").tolist()
    router.script.hang_after = 1

    def use() -> None:
        with Client(router.address) as client:
            for _ in client.generate("hi", request_id="left"):
                break

    await asyncio.to_thread(use)
    await router.wait_for(lambda: router.cancelled == ["left"])


async def test_errors_surface_and_close_is_idempotent(router):
    router.script.error = QueueFull("too many")

    def use() -> None:
        client = Client(router.address)
        with pytest.raises(QueueFull):
            client.complete("hi")
        client.close()
        client.close()

    await asyncio.to_thread(use)


async def test_a_generator_left_behind_by_a_closed_client_ends_quietly(router, tokenizer):
    router.script.reply = tokenizer.encode("hello wörld").tolist()
    router.script.hang_after = 1

    def use() -> None:
        with Client(router.address) as client:
            outputs = client.generate("hi", request_id="left")
            next(outputs)
        outputs.close()

    await asyncio.to_thread(use)
    await router.wait_for(lambda: router.cancelled == ["left"])
