"""A server, its interceptors and the calling side, over a real connection."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import REGISTRY
from pydantic import TypeAdapter

from sagellm_common.core.errors import (
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    PeerLost,
    QueueFull,
    SageError,
)
from sagellm_common.rpc import channels, interceptors
from sagellm_common.rpc import server as rpc_server
from sagellm_common.rpc.channels import ChannelPool, call, stream
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.server import GrpcServer, Registrar

NAME = "sagellm.v1.InferenceService"
SERVER_PING_OPTION = "grpc.http2.min_ping_interval_without_data_ms"


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Does in each call what the test says."""

    def __init__(self) -> None:
        self.unary: Callable[[], Awaitable[None]] | None = None
        self.before_end: Callable[[], Awaitable[None]] | None = None
        self.metadata: dict[str, Any] = {}
        self.ended = asyncio.Event()

    async def CancelGeneration(self, request: Any, context: Any) -> Any:
        self.metadata = dict(context.invocation_metadata())
        if self.unary:
            await self.unary()
        return inference_pb2.CancelGenerationResponse()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            for index in range(2):
                yield inference_pb2.GenerateResponse(index=index)
            if self.before_end:
                await self.before_end()
        finally:
            self.ended.set()


class Decode(worker_pb2_grpc.DecodeServiceServicer):
    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if not request.cancel.request_id:
                raise InvalidRequest("request_id is empty")
            yield worker_pb2.DecodeSessionResponse(
                outputs=[worker_pb2.DecodeResponse(request_id=request.cancel.request_id)]
            )


def registrars(inference: Inference) -> list[Registrar]:
    return [
        Registrar(NAME, inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference),
        Registrar("sagellm.v1.DecodeService", worker_pb2_grpc.add_DecodeServiceServicer_to_server, Decode()),
    ]


@pytest.fixture
def inference() -> Inference:
    return Inference()


@pytest.fixture
async def server(inference: Inference) -> AsyncIterator[GrpcServer]:
    server = GrpcServer("127.0.0.1:0", registrars(inference))
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    port = await server.start()
    async with ChannelPool() as pool:
        yield pool.get(f"127.0.0.1:{port}")


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


def raising(err: BaseException) -> Callable[[], Awaitable[None]]:
    async def behaviour() -> None:
        raise err

    return behaviour


def counted(method: str, code: str) -> float:
    labels = {"service": NAME, "method": method, "code": code}
    return REGISTRY.get_sample_value("sagellm_rpc_requests_total", labels) or 0.0


async def until_counted(method: str, code: str, count: float) -> None:
    """The server counts a call after its answer is on the way."""
    async with asyncio.timeout(10):
        while counted(method, code) != count:  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0.01)


CANCEL = inference_pb2.CancelGenerationRequest(request_id="r1")
GENERATE = inference_pb2.GenerateRequest(request_id="r1")


# ---- errors ----


async def test_typed_errors_reach_the_caller(inference: Inference, stub: Any) -> None:
    inference.unary = inference.before_end = raising(QueueFull("full", retry_after_s=0.5))
    before = counted("CancelGeneration", "RESOURCE_EXHAUSTED")
    with pytest.raises(QueueFull, match="^full$") as caught:
        await call(stub.CancelGeneration, CANCEL, timeout_s=5)
    assert caught.value.retry_after_s == 0.5
    await until_counted("CancelGeneration", "RESOURCE_EXHAUSTED", before + 1)

    received = []
    with pytest.raises(QueueFull):
        async with aclosing(stream(stub.Generate, GENERATE, timeout_s=5)) as messages:
            async for message in messages:
                received.append(message.index)  # noqa: PERF401 - what came before the error counts
    assert received == [0, 1]


async def test_an_untyped_error_is_logged_and_hidden(
    inference: Inference, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    inference.unary = raising(RuntimeError("secret path"))
    with pytest.raises(Internal) as caught:
        await call(stub.CancelGeneration, CANCEL, timeout_s=5)
    assert "secret" not in caught.value.message
    record = next(r for r in caplog.records if r.name == interceptors.__name__)
    assert record.levelno == logging.ERROR
    assert "request_id=r1" in record.getMessage()
    assert record.exc_info and "secret path" in str(record.exc_info[1])


async def test_a_value_that_fails_validation_is_the_callers_fault(inference: Inference, stub: Any) -> None:
    async def validate() -> None:
        TypeAdapter(int).validate_python("x")

    inference.unary = validate
    with pytest.raises(InvalidRequest):
        await call(stub.CancelGeneration, CANCEL, timeout_s=5)


async def test_success_is_counted_and_measured(inference: Inference, stub: Any) -> None:
    def measured(method: str) -> float:
        labels = {"service": NAME, "method": method}
        return REGISTRY.get_sample_value("sagellm_rpc_duration_seconds_count", labels) or 0.0

    methods = ("CancelGeneration", "Generate")
    before = [(counted(m, "OK"), measured(m)) for m in methods]
    await call(stub.CancelGeneration, CANCEL, timeout_s=5)
    async with aclosing(stream(stub.Generate, GENERATE, timeout_s=5)) as messages:
        assert [m.index async for m in messages] == [0, 1]
    for method, (count, _) in zip(methods, before, strict=True):
        await until_counted(method, "OK", count + 1)
    assert [measured(m) for m in methods] == [b + 1 for _, b in before]


async def test_a_method_nobody_serves(channel: grpc.aio.Channel) -> None:
    stub: Any = worker_pb2_grpc.PrefillServiceStub(channel)
    with pytest.raises(Internal, match="UNIMPLEMENTED"):
        await call(stub.Cancel, worker_pb2.CancelRequest(), timeout_s=5)


async def test_a_session_carries_errors_and_messages(channel: grpc.aio.Channel) -> None:
    stub: Any = worker_pb2_grpc.DecodeServiceStub(channel)
    session = stub.Session(timeout=5)
    for request_id in ("a", "b"):
        await session.write(worker_pb2.DecodeSessionRequest(cancel=worker_pb2.CancelRequest(request_id=request_id)))
        answer = await session.read()
        assert answer.outputs[0].request_id == request_id
    await session.write(worker_pb2.DecodeSessionRequest(cancel=worker_pb2.CancelRequest()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---- cancellation, deadlines, connections ----


async def test_leaving_a_stream_ends_the_handler(inference: Inference, stub: Any) -> None:
    inference.before_end = asyncio.Event().wait  # type: ignore[assignment]
    before = counted("Generate", "CANCELLED")
    async with aclosing(stream(stub.Generate, GENERATE, timeout_s=60)) as messages:
        assert (await anext(messages)).index == 0
    async with asyncio.timeout(10):
        await inference.ended.wait()
    await until_counted("Generate", "CANCELLED", before + 1)


async def test_a_deadline_is_typed_and_ends_the_handler(inference: Inference, stub: Any) -> None:
    inference.before_end = asyncio.Event().wait  # type: ignore[assignment]
    with pytest.raises(DeadlineExceeded):
        async with aclosing(stream(stub.Generate, GENERATE, timeout_s=0.2)) as messages:
            async for _ in messages:
                pass
    async with asyncio.timeout(10):
        await inference.ended.wait()


async def test_the_callers_own_cancellation_passes(inference: Inference, stub: Any) -> None:
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    inference.unary = hang
    task = asyncio.create_task(call(stub.CancelGeneration, CANCEL, timeout_s=60))
    async with asyncio.timeout(10):
        await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_channel_closed_underneath_is_a_lost_peer(inference: Inference, server: GrpcServer) -> None:
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    inference.unary = hang
    pool = ChannelPool()
    stub: Any = inference_pb2_grpc.InferenceServiceStub(pool.get(f"127.0.0.1:{await server.start()}"))
    task = asyncio.create_task(call(stub.CancelGeneration, CANCEL, timeout_s=60))
    async with asyncio.timeout(10):
        await reached.wait()
        await pool.close()
    for attempt in (task, asyncio.create_task(call(stub.CancelGeneration, CANCEL, timeout_s=60))):
        with pytest.raises(PeerLost, match="closed"):
            await attempt


async def test_a_call_may_be_silent_for_many_keepalive_pings(
    inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is one whose long prompt is being computed. Both sides are a hundred times faster here."""

    def faster(options: list[tuple[str, int]], *names: str) -> list[tuple[str, int]]:
        assert set(names) <= {name for name, _ in options}
        return [(name, value // 100 if name in names else value) for name, value in options]

    monkeypatch.setattr(rpc_server, "_OPTIONS", faster(rpc_server._OPTIONS, SERVER_PING_OPTION))
    monkeypatch.setattr(channels, "_OPTIONS", faster(channels._OPTIONS, "grpc.keepalive_time_ms"))
    server = GrpcServer("127.0.0.1:0", registrars(inference))
    port = await server.start()

    async def compute() -> None:
        await asyncio.sleep(4)  # gRPC pings once a second at most; a strict server hangs up at the third

    inference.unary = compute
    try:
        async with ChannelPool() as pool:
            cancel = inference_pb2_grpc.InferenceServiceStub(pool.get(f"127.0.0.1:{port}")).CancelGeneration
            await call(cancel, inference_pb2.CancelGenerationRequest(request_id="r"), timeout_s=10)
    finally:
        await server.stop(0)


async def test_nobody_there_is_a_lost_peer() -> None:
    async with ChannelPool() as pool:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(pool.get("127.0.0.1:1"))
        with pytest.raises(PeerLost):
            await call(stub.CancelGeneration, CANCEL, timeout_s=5)


async def test_one_channel_for_one_address() -> None:
    async with ChannelPool() as pool:
        channel = pool.get("127.0.0.1:1")
        assert pool.get("127.0.0.1:1") is channel
        assert pool.get("127.0.0.1:2") is not channel
        await pool.drop("127.0.0.1:1")
        assert pool.get("127.0.0.1:1") is not channel


async def test_a_large_message_passes(stub: Any) -> None:
    request = inference_pb2.CancelGenerationRequest(request_id="x" * (20 << 20))
    await call(stub.CancelGeneration, request, timeout_s=30)


# ---- health, reflection, port ----


@pytest.mark.parametrize("service", ["", NAME, "sagellm.v1.DecodeService"])
async def test_health(server: GrpcServer, channel: grpc.aio.Channel, service: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    status = health_pb2.HealthCheckResponse

    async def health() -> int:
        answer: Any = await call(stub.Check, request, timeout_s=5)
        return int(answer.status)

    assert await health() == status.NOT_SERVING
    await server.set_serving(True)
    assert await health() == status.SERVING
    await server.set_serving(False)
    assert await health() == status.NOT_SERVING


async def test_reflection_lists_all_services(channel: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
    names = [s.name async for answer in answers for s in answer.list_services_response.service]
    assert {NAME, "sagellm.v1.DecodeService", "grpc.health.v1.Health"} <= set(names)


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {bind}: the port is in use"):
            await GrpcServer(bind, []).start()


async def test_a_session_port_in_use_is_named(inference: Inference) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = GrpcServer("127.0.0.1:0", registrars(inference), session_port=port)
        with pytest.raises(ConfigError, match=f"cannot listen for sessions on 127.0.0.1:{port}: .*--session-port"):
            await server.start()
        await server.stop(0)


async def test_two_servers_never_share_a_port(server: GrpcServer) -> None:
    port = await server.start()
    with pytest.raises(ConfigError):
        await GrpcServer(f"127.0.0.1:{port}", []).start()


async def test_stop_is_idempotent_and_lets_running_calls_end(inference: Inference, server: GrpcServer) -> None:
    reached, finish = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await finish.wait()

    inference.unary = wait
    async with ChannelPool() as pool:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(pool.get(f"127.0.0.1:{await server.start()}"))
        running = asyncio.create_task(call(stub.CancelGeneration, CANCEL, timeout_s=30))
        async with asyncio.timeout(10):
            await reached.wait()
            stopping = asyncio.create_task(server.stop(20))
            await asyncio.sleep(0)
            finish.set()
            await running
            await stopping
            await server.stop(0)
        with pytest.raises(SageError):
            await call(stub.CancelGeneration, CANCEL, timeout_s=5)


# ---- traces ----


async def test_the_trace_goes_along(inference: Inference, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, str]]] = []

    class Span:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def span(name: str, carrier: dict[str, str], **attributes: object) -> Span:
        seen.append((name, carrier))
        return Span()

    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    monkeypatch.setattr(interceptors, "span", span)
    monkeypatch.setattr("sagellm_common.rpc.channels.current_carrier", lambda: {"traceparent": trace})
    await call(stub.CancelGeneration, CANCEL, timeout_s=5)
    assert [name for name, _ in seen] == [f"{NAME}/CancelGeneration"]
    assert seen[0][1]["traceparent"] == trace
