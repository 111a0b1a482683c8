from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import pytest
from opentelemetry.trace import format_trace_id

from sagellm_common.core.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    Internal,
    InvalidRequest,
    KvCorrupt,
    KvExhausted,
    LeaseExpired,
    NoWorker,
    PeerLost,
    QueueFull,
)
from services.gateway import exchange
from services.gateway.errors import HttpError
from tests.support.gateway import serve_gateway
from tests.support.scripted_router import WAIT_S, Script, model_info, scripted_router

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hello"}
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


def events(text: str) -> list:
    """The data of server-sent events, decoded."""
    data = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "code", "retry_after"),
        [
            (QueueFull("full", retry_after_s=2.5), 429, "queue_full", "3"),
            (KvExhausted("no blocks"), 429, "kv_exhausted", "1"),
            (NoWorker("nobody"), 503, "no_worker", "1"),
            (PeerLost("gone"), 503, "peer_lost", "1"),
            (LeaseExpired("late"), 503, "lease_expired", "1"),
            (DeadlineExceeded("late"), 504, "deadline_exceeded", None),
            (Cancelled("by hand"), 499, "cancelled", None),
            (Internal("secret"), 500, "internal", None),
            (EngineFailed("secret"), 500, "engine_failed", None),
            (KvCorrupt("secret"), 500, "kv_corrupt", None),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_before_the_first_token_it_is_the_status(
        self, http, router, error, status, code, retry_after, stream
    ):
        router.script.error = error
        response = await http.post(CHAT_URL, json=CHAT | {"stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert response.headers.get("retry-after") == retry_after
        assert "secret" not in response.text

    async def test_in_mid_stream_it_is_an_event_and_the_end(self, http, router):
        router.script.error, router.script.error_after = PeerLost("decode-0 is gone"), 3
        response = await http.post(CHAT_URL, json=CHAT | {"stream": True})
        received = events(response.text)
        assert response.status_code == 200
        assert received[-1]["error"]["code"] == "peer_lost"
        assert sum("error" in event for event in received) == 1

    async def test_one_failing_choice_ends_all(self, http, router):
        router.script.error, router.script.error_after = QueueFull("full"), 2
        response = await http.post(CHAT_URL, json=CHAT | {"n": 3})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")

    async def test_a_refusal_of_the_router_names_the_field(self, http, router):
        router.script.error = InvalidRequest("stop_token_ids is 900", metadata={"field": "stop_token_ids"})
        response = await http.post(TEXT_URL, json=TEXT)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "stop_token_ids")

    async def test_the_deadline(self, router):
        router.script.hang_after = 0
        async with serve_gateway(router.address, timeout_s=0.05) as url, httpx.AsyncClient(base_url=url) as http:
            assert (await http.post(TEXT_URL, json=TEXT)).status_code == 504

    async def test_no_tokenizer_says_no_paths(self, http, router, tmp_path):
        router.script.models = [model_info(str(tmp_path / "away"))]
        response = await http.post(TEXT_URL, json=TEXT)
        assert response.status_code == 500
        assert str(tmp_path) not in response.text


class TestReadiness:
    async def test_ready_and_health(self, http):
        assert (await http.get("/health")).json() == {"status": "ok"}
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["models"]) == (200, ["tiny"])

    async def test_without_a_model_nothing_under_v1_is_served(self, http, router):
        models, router.script.models = router.script.models, []
        assert (await http.get("/ready")).status_code == 503
        for response in (await http.get("/v1/models"), await http.post(TEXT_URL, json=TEXT)):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
            assert response.headers["retry-after"]
        router.script.models = models
        assert (await http.get("/ready")).status_code == 200
        assert (await http.post(TEXT_URL, json=TEXT)).status_code == 200

    async def test_without_a_router(self):
        async with serve_gateway("127.0.0.1:1") as url, httpx.AsyncClient(base_url=url, timeout=10) as http:
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/ready")).status_code == 503
            response = await http.post(TEXT_URL, json=TEXT)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "peer_lost")


class TestDisconnect:
    """The client goes away; the router's call must be cancelled at once."""

    @pytest.mark.parametrize(
        ("hang_after", "stream"), [(0, False), (0, True), (3, False), (3, True)], ids=lambda v: str(v)
    )
    @pytest.mark.parametrize("n", [1, 3])
    async def test_at_any_stage(self, http, router, hang_after, stream, n):
        router.script.hang_after = hang_after
        body = CHAT | {"stream": stream, "n": n}

        async def post() -> None:
            async with http.stream("POST", CHAT_URL, json=body) as response:
                async for _ in response.aiter_bytes():
                    pass

        task = asyncio.ensure_future(post())
        await router.wait_for(lambda: len(router.requests) == n)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await router.wait_for(lambda: len(router.cancelled) == n)
        assert sorted(router.cancelled) == sorted(r.request_id for r in router.requests)
        router.script.hang_after = None
        assert (await http.post(CHAT_URL, json=CHAT)).status_code == 200

    async def test_after_the_first_chunk_was_read(self, http, router):
        router.script.hang_after = 2
        async with http.stream("POST", CHAT_URL, json=CHAT | {"stream": True}) as response:
            async for _ in response.aiter_bytes():
                break
        await router.wait_for(lambda: len(router.cancelled) == 1)

    async def test_while_the_body_is_sent(self, http, router):
        host, port = http.base_url.host, http.base_url.port
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await http.post(TEXT_URL, json=TEXT)).status_code == 200
        assert len(router.requests) == 1


class TestStop:
    async def test_a_stop_string_over_many_tokens(self, http, router):
        response = (await http.post(TEXT_URL, json=TEXT | {"stop": ["🙂 E"], "max_tokens": 100})).json()
        assert (response["choices"][0]["text"], response["choices"][0]["finish_reason"]) == ("héllo 你好 ", "stop")
        assert router.cancel_calls == [response["id"]]
        assert response["usage"]["completion_tokens"] < len(router.script.reply)

    async def test_no_chunk_shows_any_of_it(self, http):
        body = TEXT | {"stop": "END", "max_tokens": 100, "stream": True}
        received = events((await http.post(TEXT_URL, json=body)).text)
        assert received.pop() == "[DONE]"
        texts = [event["choices"][0]["text"] for event in received]
        assert "".join(texts) == "héllo 你好 🙂 "
        assert not any("E" in text for text in texts)
        assert received[-1]["choices"][0]["finish_reason"] == "stop"


class TestRequestsToTheRouter:
    async def test_sampling_and_openai_defaults(self, http, router):
        await http.post(CHAT_URL, json=CHAT)
        sampling = router.requests[0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 1.0, 0, None)
        assert sampling.max_new_tokens == 256 - len(router.requests[0].prompt_token_ids)

    async def test_text_completions_default_to_16_tokens(self, http, router):
        await http.post(TEXT_URL, json=TEXT)
        await http.post(TEXT_URL, json=TEXT | {"prompt": [1] * 250})
        assert [r.sampling.max_new_tokens for r in router.requests] == [16, 6]

    async def test_extensions(self, http, router):
        extensions = {
            "top_k": 5,
            "min_p": 0.25,
            "ignore_eos": True,
            "repetition_penalty": 1.5,
            "stop_token_ids": [7],
            "min_tokens": 2,
            "priority": -1,
            "cache_salt": "s",
            "seed": -1,
        }
        await http.post(TEXT_URL, json=TEXT | extensions)
        (request,) = router.requests
        s = request.sampling
        assert (s.top_k, s.min_p, s.ignore_eos, s.repetition_penalty) == (5, 0.25, True, 1.5)
        assert (s.stop_token_ids, s.min_new_tokens, s.seed) == ((7,), 2, 2**64 - 1)
        assert (request.priority, request.cache_salt) == (-1, "s")

    async def test_choices_have_seeds_and_ids_of_their_own(self, http, router):
        response = (await http.post(TEXT_URL, json=TEXT | {"n": 3, "seed": 5})).json()
        assert sorted(r.sampling.seed for r in router.requests) == [5, 6, 7]
        assert {r.request_id for r in router.requests} == {f"{response['id']}-{i}" for i in range(3)}

    async def test_prompts_of_every_kind(self, http, router, tokenizer):
        hello = tokenizer.encode("hello").tolist()
        for prompt in ("hello", hello, ["hello", "hello"], [hello, [7]]):
            await http.post(TEXT_URL, json=TEXT | {"prompt": prompt})
        received = [r.prompt_token_ids.tolist() for r in router.requests]
        assert received[:4] == [hello] * 4
        assert sorted(received[4:]) == sorted([hello, [7]])

    async def test_chat_goes_through_the_template(self, http, router, tokenizer):
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
        await http.post(CHAT_URL, json=CHAT | {"messages": messages})
        expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
        assert router.requests[0].prompt_token_ids.tolist() == tokenizer.encode_chat(expected).tolist()

    async def test_the_trace_goes_on_to_the_router(self, http, router):
        parent = f"00-{format_trace_id(0xABC)}-{5:016x}-01"
        await http.post(TEXT_URL, json=TEXT, headers={"traceparent": parent})
        assert format_trace_id(0xABC) in router.metadata[0]["traceparent"]

    async def test_a_prompt_too_long_for_the_loop(self, http, router):
        router.script.models = [model_info(router.script.models[0].path, context_length_tokens=1_000_000)]
        response = await http.post(TEXT_URL, json=TEXT | {"prompt": "hello " * 20_000})
        assert response.status_code == 200
        assert response.json()["usage"]["prompt_tokens"] == len(router.requests[0].prompt_token_ids) > 20_000


class TestAnswers:
    async def test_the_extension_and_the_request_id(self, http):
        response = await http.post(CHAT_URL, json=CHAT)
        body = response.json()
        assert response.headers["x-request-id"] == body["id"] == body["sagellm"]["request_id"]
        assert body["sagellm"]["kv_bytes_transferred"] == 4096
        assert body["sagellm"]["ttft_ms"] == 1.235

    async def test_the_extension_lists_several_generations(self, http):
        body = (await http.post(TEXT_URL, json=TEXT | {"prompt": ["a", "b"], "n": 2})).json()
        assert [g["request_id"] for g in body["sagellm"]["generations"]] == [f"{body['id']}-{i}" for i in range(4)]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert body["usage"]["prompt_tokens"] == 2  # each prompt once

    async def test_every_token_is_one_write(self, http, router):
        async with http.stream("POST", CHAT_URL, json=CHAT | {"stream": True}) as response:
            text = (await response.aread()).decode()
        contents = [e["choices"][0]["delta"].get("content") for e in events(text)[:-1]]
        # The role, each token that completed a character, and the end.
        assert contents[0] == ""
        assert "".join(c or "" for c in contents) == "héllo 你好 🙂 END of it"
        assert len(contents) <= len(router.script.reply) + 1

    async def test_an_incomplete_character_at_the_end_is_shown(self, http, router, tokenizer):
        half = [t for t in range(320) if tokenizer.token_bytes(t) == b"\xf0"]
        router.script.reply = half
        body = (await http.post(TEXT_URL, json=TEXT)).json()
        streamed = events((await http.post(TEXT_URL, json=TEXT | {"stream": True})).text)
        assert body["choices"][0]["text"] == "\ufffd" == "".join(e["choices"][0]["text"] for e in streamed[:-1])

    async def test_an_empty_answer(self, http, router):
        router.script.reply = []
        body = (await http.post(CHAT_URL, json=CHAT)).json()
        assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("", "stop")
        received = events((await http.post(CHAT_URL, json=CHAT | {"stream": True})).text)
        assert [e["choices"][0]["finish_reason"] for e in received[:-1]] == [None, "stop"]


async def test_a_generation_that_outlasts_the_shutdown_is_told_and_cancelled(router):
    router.script.hang_after = 2
    async with httpx.AsyncClient(timeout=10) as http:
        async with serve_gateway(router.address) as url:
            request = http.build_request("POST", url + TEXT_URL, json=TEXT | {"stream": True})
            response = await http.send(request, stream=True)  # returns with the first token
        text = (await response.aread()).decode()
    assert events(text)[-1]["error"]["code"] == "draining"
    await router.wait_for(lambda: len(router.cancelled) == 1)


async def test_metrics_count_what_was_served(http):
    await http.post(TEXT_URL, json=TEXT)
    await http.post(TEXT_URL, json=TEXT | {"n": 9})
    await http.get("/nowhere")
    text = (await http.get("/metrics")).text
    assert 'sagellm_gateway_requests_total{code="200",route="/v1/completions"}' in text
    assert 'sagellm_gateway_requests_total{code="400",route="/v1/completions"}' in text
    assert 'sagellm_gateway_requests_total{code="404",route="other"}' in text
    for name in ("ttft_seconds", "tpot_seconds", "request_duration_seconds"):
        assert f"sagellm_gateway_{name}_count" in text
    assert "sagellm_gateway_completion_tokens_total" in text
    assert "sagellm_gateway_prompt_tokens_total" in text


async def test_the_gateway_outlives_the_router(tokenizer_dir):
    script = Script(reply=[10, 11], models=[model_info(str(tokenizer_dir))])
    async with AsyncExitStack() as stack:
        async with scripted_router(script) as router:
            url = await stack.enter_async_context(serve_gateway(router.address))
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=10))
            assert (await http.post(TEXT_URL, json=TEXT)).status_code == 200
        assert (await http.post(TEXT_URL, json=TEXT)).status_code == 503
        async with scripted_router(script, router.address), asyncio.timeout(WAIT_S):
            while (await http.post(TEXT_URL, json=TEXT)).status_code == 503:
                pass  # each answer comes after an attempt to connect


async def test_a_client_that_stops_reading_is_given_up(monkeypatch):
    monkeypatch.setattr(exchange, "_STALL_TIMEOUT_S", 0.01)

    async def send(message):
        await asyncio.Event().wait()

    stalled = exchange.Exchange(send, send, "r")
    with pytest.raises(exchange.Disconnected):
        await stalled.send_events([{}])
    await stalled.send_error(HttpError(503, "late", "late"))


async def test_the_class_of_a_request_is_what_its_header_says(http, router):
    for headers, service_class in (({"x-sagellm-class": "bulk"}, "bulk"), ({}, "")):
        answer = await http.post("/v1/completions", json={"prompt": "a b", "max_tokens": 2}, headers=headers)
        assert answer.status_code == 200
        assert router.requests[-1].service_class == service_class
