"""Wrong input to a real cluster: a typed error at once, naming the field; the cluster goes on, nothing is leaked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.types import pack_int32
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.support.checks import assert_nothing_leaked
from tests.support.cluster import RunningCluster

TIMEOUT_S = 20.0
PROMPT = pack_int32(range(10, 30))
NAN = float("nan")


@pytest.fixture(autouse=True)
async def still_serving(cluster: RunningCluster) -> AsyncIterator[None]:
    yield
    async with AsyncClient(cluster.router_address) as client:
        done = await client.complete("still there?", max_tokens=3, ignore_eos=True, timeout_s=TIMEOUT_S)
    assert len(done.token_ids) == 3
    await assert_nothing_leaked(cluster)


def reason_of(error: grpc.RpcError) -> tuple[str, str, str]:
    """(gRPC code, ErrorInfo.reason, message)"""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "sagellm"
    return grpc.StatusCode(error.code()).name, info.reason, status.message


@pytest.mark.parametrize(
    ("request_", "code", "reason", "names"),
    [
        ({"prompt_token_ids": b""}, "INVALID_ARGUMENT", "INVALID_REQUEST", "prompt"),
        ({"prompt_token_ids": b"123"}, "INVALID_ARGUMENT", "INVALID_REQUEST", "prompt_token_ids"),
        ({"prompt_token_ids": pack_int32([10**6])}, "INVALID_ARGUMENT", "INVALID_REQUEST", "1000000"),
        ({"prompt_token_ids": pack_int32([-1])}, "INVALID_ARGUMENT", "INVALID_REQUEST", "-1"),
        ({"prompt_token_ids": pack_int32([5] * 5000)}, "INVALID_ARGUMENT", "CONTEXT_TOO_LONG", "2048"),
        ({"model": "gpt-9"}, "NOT_FOUND", "UNKNOWN_MODEL", "gpt-9"),
        ({"sampling": {"max_new_tokens": 0}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "max_new_tokens"),
        ({"sampling": {"max_new_tokens": -5}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "max_new_tokens"),
        ({"sampling": {"max_new_tokens": 2**31 - 1}}, "INVALID_ARGUMENT", "CONTEXT_TOO_LONG", "2147483647"),
        ({"sampling": {"max_new_tokens": 3, "temperature": NAN}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "temperature"),
        ({"sampling": {"max_new_tokens": 3, "temperature": -1}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "temperature"),
        ({"sampling": {"max_new_tokens": 3, "top_p": 1.5}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "top_p"),
        ({"sampling": {"max_new_tokens": 3, "top_k": -1}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "top_k"),
        ({"sampling": {"max_new_tokens": 3, "min_p": 2}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "min_p"),
        (
            {"sampling": {"max_new_tokens": 3, "stop_token_ids": [10**6]}},
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "stop_token_ids",
        ),
        ({"sampling": {"max_new_tokens": 3, "num_logprobs": 99}}, "INVALID_ARGUMENT", "INVALID_REQUEST", "logprobs"),
    ],
)
def test_grpc(cluster: RunningCluster, request_: dict[str, Any], code: str, reason: str, names: str) -> None:
    good = {"prompt_token_ids": PROMPT, "sampling": {"max_new_tokens": 3}}
    with grpc.insecure_channel(cluster.router_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(inference_pb2.GenerateRequest(**(good | request_)), timeout=TIMEOUT_S))
    found_code, found_reason, message = reason_of(caught.value)
    assert (found_code, found_reason) == (code, reason)
    assert names in message


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("completions", b"{", 400),
        ("completions", b"[]", 400),
        ("completions", b'{"model": "tiny-llama", "prompt": ""}', 400),
        ("completions", b'{"model": "tiny-llama", "prompt": "x", "max_tokens": -3}', 400),
        ("completions", b'{"model": "tiny-llama", "prompt": "x", "max_tokens": 99999999}', 400),
        ("completions", b'{"model": "tiny-llama", "prompt": "x", "temperature": NaN}', 400),
        ("completions", b'{"model": "tiny-llama", "prompt": {"a": 1}}', 400),
        ("completions", b'{"model": "nobody", "prompt": "x"}', 404),
        ("completions", b'{"model": "tiny-llama", "prompt": "' + b"x" * 5000 + b'"}', 400),
        ("chat/completions", b'{"model": "tiny-llama", "messages": [{"role": "wizard", "content": "x"}]}', 400),
        ("chat/completions", b'{"model": "tiny-llama", "messages": "x"}', 400),
        ("embeddings", b"{}", 404),
    ],
)
async def test_http(cluster: RunningCluster, path: str, body: bytes, status: int) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http:
        response = await http.post(f"{cluster.gateway_url}/v1/{path}", content=body)
    assert response.status_code == status, response.text
    assert {"message", "type", "param", "code"} <= response.json()["error"].keys()


async def test_a_worker_asked_directly_refuses_too(cluster: RunningCluster) -> None:
    """What a router of another version might send."""
    async with grpc.aio.insecure_channel(cluster.address("decode-0")) as channel:
        stub = worker_pb2_grpc.DecodeServiceStub(channel)
        for request, reason in (
            (worker_pb2.ReserveRequest(request_id="a", prompt_token_ids=b""), "INVALID_REQUEST"),
            (worker_pb2.ReserveRequest(request_id="b", prompt_token_ids=pack_int32([5] * 9000)), "CONTEXT_TOO_LONG"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(stub.Reserve(request, timeout=TIMEOUT_S), TIMEOUT_S)
            status = rpc_status.from_call(_as_call(caught.value))
            info = error_details_pb2.ErrorInfo()
            assert any(detail.Unpack(info) for detail in status.details)
            assert info.reason == reason


def _as_call(error: grpc.aio.AioRpcError) -> Any:
    """grpc_status reads synchronous calls."""

    class Call:
        trailing_metadata = staticmethod(lambda: tuple(error.trailing_metadata()))
        code = staticmethod(error.code)
        details = staticmethod(error.details)

    return Call()
