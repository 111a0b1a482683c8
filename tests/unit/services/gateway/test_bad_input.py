"""What bad input gets: a status, a code and the name of the field, at once; and the next request is served."""

from __future__ import annotations

import json

import httpx
import pytest
import pytest_asyncio

from sagellm_common.core.config import GatewayConfig
from tests.support.gateway import serve_gateway
from tests.support.scripted_router import Script, model_info, scripted_router

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hello"}
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tokenizer_dir):
    """One gateway for all of this file: nothing a test sends may leave a trace in it."""
    async with (
        scripted_router(Script(reply=[10, 11, 12], models=[model_info(str(tokenizer_dir))])) as router,
        serve_gateway(router.address) as url,
        httpx.AsyncClient(base_url=url, timeout=10) as http,
    ):
        yield router, http


@pytest.fixture
def router(shared):
    router, _ = shared
    router.requests.clear()
    return router


@pytest.fixture
def http(shared):
    return shared[1]


def assert_error(response: httpx.Response, status: int, code: str, param: str | None, message: str = "") -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert response.headers["x-request-id"]


async def assert_still_serves(http: httpx.AsyncClient) -> None:
    assert (await http.post(TEXT_URL, json=TEXT)).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"priority": "high"}, "priority"),
    ],
)
async def test_invalid_values_name_the_field(http, router, change, param):
    response = await http.post(CHAT_URL, json=CHAT | change)
    assert_error(response, 400, "invalid_value", param, param.partition("[")[0])
    assert router.requests == []
    await assert_still_serves(http)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
async def test_a_number_that_is_none_is_refused(http, value):
    body = json.dumps(CHAT)[:-1] + f', "temperature": {value}}}'
    assert_error(await http.post(CHAT_URL, content=body), 400, "invalid_value", "temperature")


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (CHAT_URL, CHAT | {"tools": [{"type": "function"}]}, "tools"),
        (CHAT_URL, CHAT | {"tool_choice": "auto"}, "tool_choice"),
        (CHAT_URL, CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT_URL, CHAT | {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT_URL, CHAT | {"frequency_penalty": 0.5}, "frequency_penalty"),
        (CHAT_URL, CHAT | {"presence_penalty": -1}, "presence_penalty"),
        (CHAT_URL, CHAT | {"audio": {"voice": "x"}}, "audio"),
        (CHAT_URL, CHAT | {"modalities": ["audio"]}, "modalities"),
        (CHAT_URL, CHAT | {"reasoning_effort": "high"}, "reasoning_effort"),
        (
            CHAT_URL,
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
        (TEXT_URL, TEXT | {"suffix": "x"}, "suffix"),
        (TEXT_URL, TEXT | {"echo": True}, "echo"),
        (TEXT_URL, TEXT | {"best_of": 2}, "best_of"),
    ],
)
async def test_what_openai_has_and_this_has_not_is_refused_with_a_fix(http, router, url, body, param):
    assert_error(await http.post(url, json=body), 400, "unsupported_parameter", param, "not supported here; ")
    assert router.requests == []


async def test_unknown_fields_are_refused_by_name(http):
    assert_error(await http.post(CHAT_URL, json=CHAT | {"max_token": 5}), 400, "unknown_parameter", "max_token")
    messages = [{"role": "user", "content": "hi", "colour": "red"}]
    response = await http.post(CHAT_URL, json=CHAT | {"messages": messages})
    assert_error(response, 400, "unknown_parameter", "messages[0].colour")


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
        dict.fromkeys(("n", "temperature", "stop", "seed", "max_tokens", "stream", "logprobs", "top_k")),
    ],
    ids=["bookkeeping", "neutral", "text", "null"],
)
async def test_what_changes_nothing_is_accepted(http, extra):
    response = await http.post(CHAT_URL, json=CHAT | extra)
    assert response.status_code == 200, response.text


async def test_an_answer_can_be_sent_back_whole(http):
    message = (await http.post(CHAT_URL, json=CHAT)).json()["choices"][0]["message"]
    message |= {"tool_calls": None, "function_call": None, "annotations": [], "audio": None}
    response = await http.post(CHAT_URL, json=CHAT | {"messages": [*CHAT["messages"], message]})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "invalid_request"),
        ([], "invalid_value"),
        ([[]], "invalid_request"),
        (["hello", ""], "invalid_request"),
        ([320], "invalid_request"),
        ([1] * 256, "context_length_exceeded"),
        (["x"] * 65, "invalid_value"),
    ],
    ids=["empty", "no ids", "no ids in a list", "second empty", "no token", "beyond the context", "too many"],
)
async def test_bad_prompts(http, router, prompt, code):
    assert_error(await http.post(TEXT_URL, json=TEXT | {"prompt": prompt}), 400, code, "prompt")
    assert router.requests == []
    await assert_still_serves(http)


@pytest.mark.parametrize("prompt", [5, [1, "a"], [1.5], {"a": 1}, [[1], "a"], None, [-1]])
async def test_prompts_of_the_wrong_type(http, prompt):
    response = await http.post(TEXT_URL, json=TEXT | {"prompt": prompt})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_value")
    assert error["param"].startswith("prompt")


async def test_more_tokens_than_the_context_holds(http):
    response = await http.post(CHAT_URL, json=CHAT | {"max_tokens": 256})
    assert_error(response, 400, "context_length_exceeded", "max_tokens", "256 tokens")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000])
async def test_bad_json(http, content):
    response = await http.post(CHAT_URL, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_value")
    await assert_still_serves(http)


@pytest.mark.parametrize("url", [CHAT_URL, TEXT_URL])
async def test_unknown_model(http, url):
    body = (CHAT if url == CHAT_URL else TEXT) | {"model": "gpt-5"}
    assert_error(await http.post(url, json=body), 404, "model_not_found", "model", "served: tiny")


async def test_unknown_url_and_wrong_method(http):
    assert_error(await http.get("/v1/embeddings"), 404, "unknown_url", None)
    assert_error(await http.get(CHAT_URL), 405, "method_not_allowed", None)
    assert_error(await http.post("/v1/models"), 405, "method_not_allowed", None)


async def test_a_body_over_the_limit(router):
    config = GatewayConfig(max_body_bytes=4096)
    async with serve_gateway(router.address, config) as url, httpx.AsyncClient(base_url=url) as http:
        for num_bytes in (5000, 500_000):
            body = TEXT | {"prompt": "x" * num_bytes}
            assert_error(await http.post(TEXT_URL, json=body), 413, "request_too_large", None, "4096")
        await assert_still_serves(http)
    assert len(router.requests) == 1


class TestApiKeys:
    @pytest_asyncio.fixture(loop_scope="module")
    async def http(self, router):
        config = GatewayConfig(api_keys=("one", "two"))
        async with serve_gateway(router.address, config) as url, httpx.AsyncClient(base_url=url) as client:
            yield client

    @pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer three", "Basic one", "Bearer öne"])
    async def test_a_missing_or_unknown_key_is_401(self, http, router, header):
        headers = {} if header is None else {"authorization": header.encode()}
        for response in (
            await http.post(TEXT_URL, json=TEXT, headers=headers),
            await http.get("/v1/models", headers=headers),
        ):
            assert_error(response, 401, "invalid_api_key", None)
            assert response.headers["www-authenticate"] == "Bearer"
        assert router.requests == []

    @pytest.mark.parametrize("key", ["one", "two"])
    async def test_a_known_key_is_served(self, http, key):
        response = await http.post(TEXT_URL, json=TEXT, headers={"authorization": f"Bearer {key}"})
        assert response.status_code == 200

    async def test_health_needs_no_key(self, http):
        assert (await http.get("/health")).status_code == 200


class TestTenants:
    @pytest_asyncio.fixture(loop_scope="module")
    async def http(self, router):
        config = GatewayConfig(api_keys=("anybody",), tenant_keys={"acme": ("a1", "a2")})
        async with serve_gateway(router.address, config) as url, httpx.AsyncClient(base_url=url) as client:
            yield client

    @pytest.mark.parametrize(
        ("key", "named", "tenant"),
        [("a2", None, "acme"), ("a1", "acme", "acme"), ("anybody", None, "default"), ("anybody", "new", "new")],
    )
    async def test_a_keys_tenant_is_the_requests(self, http, router, key, named, tenant):
        headers = {"authorization": f"Bearer {key}"} | ({} if named is None else {"x-sagellm-tenant": named})
        assert (await http.post(TEXT_URL, json=TEXT, headers=headers)).status_code == 200
        assert router.requests[-1].tenant == tenant

    @pytest.mark.parametrize(("key", "named"), [("a1", "other"), ("anybody", "acme")])
    async def test_nobody_is_charged_for_others(self, http, router, key, named):
        headers = {"authorization": f"Bearer {key}", "x-sagellm-tenant": named}
        response = await http.post(TEXT_URL, json=TEXT, headers=headers)
        assert_error(response, 403, "forbidden", None, named)
        assert router.requests == []
