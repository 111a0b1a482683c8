"""The official `openai` client, unmodified, against the gateway's real process. The router is scripted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from sagellm_common.client.text import Tokenizer
from sagellm_common.core.errors import PeerLost, QueueFull
from tests.support.bpe import write_tokenizer
from tests.support.scripted_router import Script, ScriptedRouter, model_info, scripted_router

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER = "héllo 你好 🙂 END of it"
MESSAGES: list[Any] = [{"role": "user", "content": "Wie geht's? 你好"}]
DEADLINE_S = 30.0


@asynccontextmanager
async def gateway_process(*args: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """The process and its ready line. It must still be alive at the end, and stop by itself on SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", *args, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            ready = json.loads(await process.stdout.readline())
        yield process, ready
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_dir)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tokenizer_dir: Path) -> AsyncIterator[tuple[ScriptedRouter, str]]:
    async with scripted_router(Script(models=[model_info(str(tokenizer_dir))])) as router:
        async with gateway_process("--port", "0", "--router", router.address) as (process, ready):
            yield router, f"{ready['url']}/v1"
        assert process.returncode == 0


@pytest.fixture
def router(served: tuple[ScriptedRouter, str], tokenizer: Tokenizer) -> ScriptedRouter:
    """The scripted router, as new."""
    router, _ = served
    router._released = False
    router.script = Script(reply=tokenizer.encode(ANSWER).tolist(), models=router.script.models)
    for seen in (router.requests, router.cancelled, router.cancel_calls):
        seen.clear()
    return router


@pytest_asyncio.fixture(loop_scope="module")
async def client(served: tuple[ScriptedRouter, str]) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served[1], api_key="none", max_retries=0, timeout=20) as client:
        yield client


class TestChat:
    async def test_whole(self, client, router, tokenizer):
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
        prompt_tokens = len(tokenizer.encode_chat(MESSAGES))
        assert router.requests[0].prompt_token_ids.tolist() == tokenizer.encode_chat(MESSAGES).tolist()
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, len(router.script.reply))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens_details.cached_tokens == 2
        assert answer.model_extra["sagellm"]["kv_bytes_transferred"] == 4096

    async def test_stream(self, client, router):
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert deltas[0].role == "assistant"
        assert [d.role for d in deltas[1:]] == [None] * (len(deltas) - 1)
        assert "".join(d.content or "" for d in deltas) == ANSWER
        assert not any("\ufffd" in (d.content or "") for d in deltas)
        assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len({c.id for c in chunks}) == 1
        assert all(c.usage is None for c in chunks)

    async def test_tokens_come_one_by_one_and_not_in_a_burst(self, client, router):
        router.script.hang_after = 3
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = ""
        async with asyncio.timeout(DEADLINE_S):
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if text:
                    break  # while the router is still generating
        await stream.close()
        assert ANSWER.startswith(text)
        await router.wait_for(lambda: len(router.cancelled) == 1)

    async def test_stream_with_usage(self, client, router):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
        assert last.choices == []
        assert last.usage.completion_tokens == len(router.script.reply)
        assert last.model_extra["sagellm"]["decode_worker_id"] == "decode-0"
        assert all(c.usage is None for c in chunks)

    async def test_logprobs(self, client, router, tokenizer):
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
        content = answer.choices[0].logprobs.content
        assert len(content) == len(router.script.reply)
        assert bytes(b for entry in content for b in entry.bytes).decode() == ANSWER
        assert [entry.logprob for entry in content] == [-0.5] * len(content)
        assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
        # The scripted router's second best is the token itself.
        assert [entry.top_logprobs[1].bytes for entry in content] == [entry.bytes for entry in content]

    async def test_streamed_logprobs_lose_no_token(self, client, router):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, stream=True, stop=["nowhere"]
        )
        entries = [e async for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        assert bytes(b for entry in entries for b in entry.bytes).decode() == ANSWER
        assert all(entry.top_logprobs == [] for entry in entries)

    async def test_four_choices(self, client, router):
        router.script.reply = lambda request: [10 + request.sampling.seed] * 4
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=4, seed=3)
        contents = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert len(set(contents)) == 4
        assert answer.usage.completion_tokens == 16

        streamed = ["", "", "", ""]
        roles = []
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=4, seed=3, stream=True
        ):
            (choice,) = chunk.choices
            streamed[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
        assert streamed == contents
        assert sorted(roles) == [0, 1, 2, 3]

    @pytest.mark.parametrize("tokens_per_message", [1, 2, 5, 100])
    @pytest.mark.parametrize("stop", ["END", ["nowhere", "🙂 END"], ["o"], ["好 🙂"]])
    async def test_stop_strings_at_any_chunking(self, client, router, tokens_per_message, stop):
        router.script.tokens_per_message = tokens_per_message
        stops = [stop] if isinstance(stop, str) else stop
        expected = ANSWER[: min(at for s in stops if (at := ANSWER.find(s)) >= 0)]
        whole = await client.chat.completions.create(model="tiny", messages=MESSAGES, stop=stop)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "stop")
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="tiny", messages=MESSAGES, stop=stop, stream=True
            )
        ]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"

    async def test_max_completion_tokens(self, client, router):
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=2)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)

    async def test_the_streaming_helper(self, client, router):
        """`chat.completions.stream` accumulates and checks the chunks itself."""
        async with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == ANSWER


class TestCompletions:
    async def test_whole_and_streamed(self, client, router):
        whole = await client.completions.create(model="tiny", prompt="hello", max_tokens=100)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (ANSWER, "stop")
        stream = await client.completions.create(model="tiny", prompt="hello", max_tokens=100, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER

    async def test_token_ids_and_extensions(self, client, router):
        answer = await client.completions.create(
            model="tiny", prompt=[5, 6, 7], extra_body={"top_k": 4, "min_p": 0.5, "ignore_eos": True}
        )
        assert answer.usage.prompt_tokens == 3
        sampling = router.requests[0].sampling
        assert (sampling.top_k, sampling.min_p, sampling.ignore_eos) == (4, 0.5, True)

    async def test_several_prompts(self, client, router):
        router.script.reply = lambda request: request.prompt_token_ids.tolist()
        answer = await client.completions.create(model="tiny", prompt=["hello", "world"], n=2)
        assert [c.text for c in answer.choices] == ["hello", "hello", "world", "world"]

    async def test_logprobs(self, client, router, tokenizer):
        answer = await client.completions.create(model="tiny", prompt="hello", max_tokens=100, logprobs=2)
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(router.script.reply)
        assert logprobs.tokens[0] == tokenizer.token_bytes(router.script.reply[0]).decode(errors="replace")
        assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
        assert all(
            token in top and 2 <= len(top) <= 3
            for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
            if "\ufffd" not in "".join(top)  # several halves of characters look the same
        )


class TestErrors:
    async def test_classes_and_bodies(self, client, router):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=-1)
        assert (bad.value.param, bad.value.code, bad.value.type) == (
            "max_tokens",
            "invalid_value",
            "invalid_request_error",
        )
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-5", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        router.script.error = QueueFull("full", retry_after_s=7)
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert full.value.response.headers["retry-after"] == "7"
        router.script.error = PeerLost("gone")
        with pytest.raises(openai.InternalServerError) as gone:
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert gone.value.status_code == 503

    async def test_in_mid_stream(self, client, router):
        router.script.error, router.script.error_after = PeerLost("decode-0 is gone"), 3
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="decode-0 is gone") as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "peer_lost"

    async def test_a_client_that_gives_up_cancels_at_the_router(self, client, router):
        router.script.hang_after = 0
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.3).chat.completions.create(model="tiny", messages=MESSAGES)
        await router.wait_for(lambda: len(router.cancelled) == 1)


async def test_models(client, router):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-5")


async def test_the_synchronous_client(served, router):
    def use() -> list[str]:
        with OpenAI(base_url=served[1], api_key="none", max_retries=0, timeout=20) as client:
            whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
            stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return [whole.choices[0].message.content or "", "".join(c.choices[0].delta.content or "" for c in stream)]

    assert await asyncio.to_thread(use) == [ANSWER, ANSWER]


class TestProcess:
    async def run(self, *args: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.gateway",
            *args,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | (env or {}),
        )
        async with asyncio.timeout(DEADLINE_S):
            _, stderr = await process.communicate()
        assert process.returncode is not None
        return process.returncode, stderr.decode()

    async def test_a_port_in_use_is_one_clear_line(self, served):
        port = httpx.URL(served[1]).port
        code, stderr = await self.run("--port", str(port), "--router", "127.0.0.1:1")
        assert code != 0
        assert stderr.count("\n") == 1
        assert f":{port}" in stderr

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--set", "gateway.colour=red"], "gateway.colour"),
            (["--set", "gateway.max_body_bytes=many"], "max_body_bytes"),
            (["--config", "/nowhere/at-all.yaml"], "/nowhere/at-all.yaml"),
            (["--port", "70000"], "70000"),
            (["--set", "cluster.port_base=0"], "--router"),
        ],
    )
    async def test_bad_configuration_is_told_without_a_traceback(self, args, said):
        code, stderr = await self.run("--port", "0", *args)
        assert code != 0
        assert stderr.startswith("services.gateway: INVALID_CONFIG: ")
        assert said in stderr
        assert "Traceback" not in stderr

    async def test_sigterm_lets_requests_in_flight_finish(self, router):
        router.script.hang_after = 3
        async with (
            gateway_process("--port", "0", "--router", router.address) as (process, ready),
            AsyncOpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            texts = [(await anext(stream)).choices[0].delta.content]
            process.send_signal(signal.SIGTERM)
            await nobody_listens(ready["address"])
            await router.release()
            texts += [chunk.choices[0].delta.content or "" async for chunk in stream]
            async with asyncio.timeout(DEADLINE_S):
                assert await process.wait() == 0
        assert "".join(texts) == ANSWER
        assert router.cancelled == []


async def nobody_listens(address: str) -> None:
    """Waits until connections to `address` are refused."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.02)
