from __future__ import annotations

import asyncio
import math
from contextlib import aclosing

import numpy as np
import pytest

from sagellm_common.client import AsyncClient
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.errors import (
    ConfigError,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
    PeerLost,
    QueueFull,
    UnknownModel,
)
from sagellm_common.core.types import FinishReason
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind
from tests.support.scripted_router import model_info

ANSWER = "héllo 你好 🙂 END of it"


@pytest.fixture
def tokenizer(tokenizer_dir):
    return Tokenizer.from_dir(tokenizer_dir)


@pytest.fixture
async def client(router, tokenizer):
    router.script.reply = tokenizer.encode(ANSWER).tolist()
    async with AsyncClient(router.address, timeout_s=10) as client:
        yield client


class TestPrompts:
    @pytest.mark.parametrize(
        "prompt",
        ["hello world", [5, 6, 7], np.array([5, 6, 7], np.int32), [{"role": "user", "content": "hi"}]],
        ids=["text", "ids", "array", "messages"],
    )
    async def test_every_kind_of_prompt_reaches_the_router_as_tokens(self, client, router, tokenizer, prompt):
        completion = await client.complete(prompt)
        assert completion.text == ANSWER
        expected = prompt
        if isinstance(prompt, str):
            expected = tokenizer.encode(prompt)
        elif isinstance(prompt[0], dict):
            expected = tokenizer.encode_chat(prompt)
        assert router.requests[0].prompt_token_ids.tolist() == list(expected)

    async def test_long_text_is_tokenized_too(self, client, router):
        router.script.models = [model_info(router.script.models[0].path, context_length_tokens=100_000)]
        await client.complete("hello " * 5000, max_tokens=1)
        assert len(router.requests[0].prompt_token_ids) > 5000

    @pytest.mark.parametrize(
        "prompt",
        ["hi " * 9_000, [{"role": "user", "content": "a"}] * 600, [5] * 20_000],
        ids=["text", "messages", "ids"],
    )
    async def test_no_long_prompt_holds_up_the_loop(self, client, router, monkeypatch, prompt):
        router.script.models = [model_info(router.script.models[0].path, context_length_tokens=100_000)]
        threads = []
        to_thread = asyncio.to_thread

        async def spied(work, *args):
            threads.append(work)
            return await to_thread(work, *args)

        await client.complete("warm", max_tokens=1)
        monkeypatch.setattr(asyncio, "to_thread", spied)
        await client.complete(prompt, max_tokens=1)
        assert len(threads) == 1

    @pytest.mark.parametrize("prompt", ["", [], np.array([], np.int32)])
    async def test_an_empty_prompt_is_refused(self, client, router, prompt):
        with pytest.raises(InvalidRequest, match="empty"):
            await client.complete(prompt)
        assert router.requests == []

    @pytest.mark.parametrize("prompt", [[-1], [320], [2**40], [1.5], ["a", "b"], [[1]]])
    async def test_what_is_no_token_is_refused(self, client, prompt):
        with pytest.raises(InvalidRequest, match="prompt"):
            await client.complete(prompt)


class TestOptions:
    async def test_all_reach_the_router(self, client, router):
        await client.complete(
            "hello",
            max_tokens=9,
            temperature=0.5,
            top_p=0.75,
            top_k=3,
            min_p=0.25,
            repetition_penalty=1.5,
            seed=2**63,
            min_tokens=2,
            ignore_eos=True,
            stop_token_ids=[4, 5],
            num_logprobs=2,
            priority=-3,
            cache_salt="salt",
            tenant="acme",
            request_id="mine",
        )
        (request,) = router.requests
        sampling = request.sampling
        assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.ignore_eos) == (9, 2, True)
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 3, 0.25)
        assert (sampling.repetition_penalty, sampling.seed, sampling.num_logprobs) == (1.5, 2**63, 2)
        assert sampling.stop_token_ids == (4, 5)
        assert (request.request_id, request.tenant, request.priority, request.cache_salt) == (
            "mine",
            "acme",
            -3,
            "salt",
        )

    async def test_by_default_it_is_greedy_and_fills_the_context(self, client, router):
        await client.complete([1, 2, 3])
        assert router.requests[0].sampling.greedy
        assert router.requests[0].sampling.max_new_tokens == 253

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"max_tokens": 0}, "max_new_tokens"),
            ({"max_tokens": -5}, "max_new_tokens"),
            ({"temperature": math.nan}, "temperature"),
            ({"temperature": -1.0}, "temperature"),
            ({"top_p": 0.0}, "top_p"),
            ({"seed": -1}, "seed"),
            ({"stop_token_ids": [999]}, "stop_token_ids"),
            ({"top_k": 2**40}, "top_k"),
        ],
    )
    async def test_out_of_range_is_refused_by_name(self, client, options, field):
        with pytest.raises(InvalidRequest, match=field):
            await client.complete("hello", **options)

    @pytest.mark.parametrize("options", [{"max_tokens": 10**9}, {"max_tokens": 256}])
    async def test_more_than_the_context_is_refused(self, client, options):
        with pytest.raises(ContextTooLong, match="at most 253"):
            await client.complete([1, 2, 3], **options)

    async def test_a_prompt_beyond_the_context_is_refused(self, client):
        with pytest.raises(ContextTooLong, match="256"):
            await client.complete([1] * 256)

    async def test_an_unknown_option_is_a_type_error(self, client):
        with pytest.raises(TypeError, match="max_token"):
            await client.complete("hello", max_token=3)


class TestStreaming:
    async def test_one_output_per_message_and_a_summary_at_the_end(self, client, router):
        outputs = [output async for output in client.generate("hello")]
        assert len(outputs) == len(router.script.reply)
        assert "".join(o.text for o in outputs) == ANSWER
        assert [t for o in outputs for t in o.token_ids] == list(router.script.reply)
        assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason is FinishReason.STOP
        assert outputs[-1].summary.kv_bytes_transferred == 4096

    async def test_a_stop_string_ends_the_text_and_the_generation(self, client, router):
        completion = await client.complete("hello", stop=["nowhere", "END"])
        assert completion.text == "héllo 你好 🙂 "
        assert completion.finish_reason is FinishReason.STOP
        assert router.cancel_calls == [completion.request_id]
        assert completion.summary.completion_tokens == len(completion.token_ids) < len(router.script.reply)
        assert completion.summary.kv_bytes_transferred == 4096  # the router's own summary was waited for

    async def test_a_stop_string_needs_no_summary_of_the_router(self, client, router):
        router.script.cancel_error = PeerLost("gone")
        completion = await client.complete([5, 6, 7], stop="END", request_id="x")
        assert completion.text == "héllo 你好 🙂 "
        assert (completion.summary.prompt_tokens, completion.summary.completion_tokens) == (
            3,
            len(completion.token_ids),
        )

    async def test_a_stop_string_in_the_last_message_needs_no_cancel(self, client, router):
        router.script.tokens_per_message = 1000
        completion = await client.complete("hello", stop="END")
        assert completion.text == "héllo 你好 🙂 "
        assert router.cancel_calls == []

    async def test_an_unfinished_stop_string_is_text(self, client):
        completion = await client.complete("hello", stop=["it's"])
        assert completion.text == ANSWER

    async def test_max_tokens_ends_with_length(self, client):
        assert (await client.complete("hello", max_tokens=2)).finish_reason is FinishReason.LENGTH

    async def test_logprobs_come_along(self, client, router):
        completion = await client.complete("hello", num_logprobs=2)
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.logprobs[0].logprob == -0.5


class TestCancellation:
    async def test_closing_the_iterator_cancels_the_call(self, client, router):
        router.script.hang_after = 2
        async with aclosing(client.generate("hello", request_id="left")) as outputs:
            async for _ in outputs:
                break
        await router.wait_for(lambda: router.cancelled == ["left"])

    async def test_breaking_out_of_the_loop_cancels_the_call(self, client, router):
        router.script.hang_after = 2
        async for _ in client.generate("hello", request_id="left"):
            break
        await router.wait_for(lambda: router.cancelled == ["left"])

    async def test_cancelling_the_task_cancels_the_call(self, client, router):
        router.script.hang_after = 0
        task = asyncio.ensure_future(client.complete("hello", request_id="left"))
        await router.wait_for(lambda: len(router.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await router.wait_for(lambda: router.cancelled == ["left"])

    async def test_cancel_by_id_ends_the_stream(self, client, router):
        router.script.hang_after = 2
        reasons = []
        async for output in client.generate("hello", request_id="x"):
            reasons.append(output.finish_reason)
            if len(reasons) == 2:
                await client.cancel("x")
        assert reasons == [None, None, FinishReason.CANCELLED]

    async def test_the_deadline_ends_a_hanging_call(self, client, router):
        router.script.hang_after = 0
        with pytest.raises(DeadlineExceeded):
            await client.complete("hello", timeout_s=0.05)


class TestErrors:
    @pytest.mark.parametrize("error_after", [0, 2])
    async def test_typed_errors_surface(self, client, router, error_after):
        router.script.error = QueueFull("too many", retry_after_s=3)
        router.script.error_after = error_after
        num_outputs = 0
        with pytest.raises(QueueFull, match="too many") as caught:
            async for _ in client.generate("hello"):
                num_outputs += 1
        assert caught.value.retry_after_s == 3
        assert num_outputs == error_after

    async def test_no_router_is_peer_lost(self):
        async with AsyncClient("127.0.0.1:1", timeout_s=5) as client:
            with pytest.raises(PeerLost):
                await client.complete("hello")

    async def test_unknown_model_names_those_there_are(self, client):
        with pytest.raises(UnknownModel, match="'other'.*tiny"):
            await client.complete("hello", model="other")

    async def test_no_model_yet(self, client, router):
        router.script.models = []
        with pytest.raises(NoWorker) as caught:
            await client.complete("hello")
        assert caught.value.retry_after_s

    async def test_a_model_path_that_is_not_here_is_a_config_error(self, client, router, tmp_path):
        router.script.models = [model_info(str(tmp_path / "away"))]
        with pytest.raises(ConfigError, match="away"):
            await client.complete("hello")

    async def test_model_path_overrides_the_workers_path(self, router, tokenizer_dir, tmp_path):
        router.script.models = [model_info(str(tmp_path / "away"))]
        router.script.reply = [10, 11]
        async with AsyncClient(router.address, model_path=str(tokenizer_dir)) as client:
            assert (await client.complete("hello")).token_ids == (10, 11)


class TestCluster:
    async def test_models_topology_and_explain(self, client):
        assert [m.name for m in await client.models()] == ["tiny"]
        view = await client.topology()
        assert (view.revision, view.connected, view.workers[0].record.worker_id) == (7, True, "prefill-0")
        assert view.workers[0].kv.balanced
        completion = await client.complete("hello")
        explanation = await client.explain(completion.request_id)
        assert explanation.plan.node(PlanNodeKind.PREFILL).end_token == 5
        assert explanation.events[0].stage == "admit"

    async def test_explaining_an_unknown_request_is_refused(self, client):
        with pytest.raises(InvalidRequest, match="nobody"):
            await client.explain("nobody")
