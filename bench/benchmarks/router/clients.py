"""The load: requests one after the other on so many lines, each timed. Every contestant gets the same."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from bench.benchmarks.router.http_parts import HttpReader, write
from bench.benchmarks.router.pace import TOKEN
from sagellm_common.client.router import RouterClient
from sagellm_common.core.types import GenerationRequest, SamplingParams, WorkerAddress
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from sagellm_common.rpc.routes import RouteSigner, encode_address
from sagellm_common.rpc.sessions import DecodeSession

TIMEOUT_S = 60.0
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Timed:
    first_s: float
    last_s: float


Ask = Callable[[int], Awaitable[Timed]]
"""One request of so many tokens."""
Line = Callable[[], Awaitable[Ask]]
"""Makes who asks, one at a time."""


async def run(line: Line, lines: int, requests: int, num_tokens: int) -> list[Timed]:
    """`requests` in all, on `lines` at a time. Raises the first error of any of them."""
    left = itertools.count()
    timed: list[Timed] = []

    async def ask_on() -> None:
        ask = await line()
        while next(left) < requests:
            timed.append(await ask(num_tokens))

    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            for _ in range(lines):
                group.create_task(ask_on())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return timed


class HttpLine(asyncio.Protocol):
    """One keep-alive connection that streams completions of `prompt`."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._reader = HttpReader(self._end, self._more)
        self._transport: asyncio.BaseTransport | None = None
        self._done: asyncio.Future[bytes] | None = None
        self._first_s = 0.0

    @staticmethod
    def to(address: str, prompt: str) -> Line:
        async def make() -> Ask:
            host, port = address.rsplit(":", 1)
            loop = asyncio.get_running_loop()
            _, line = await loop.create_connection(lambda: HttpLine(prompt), host, int(port))
            return line.ask

        return make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)

    async def ask(self, num_tokens: int) -> Timed:
        asked = {"model": "mock", "prompt": self._prompt, "max_tokens": num_tokens, "stream": True, "temperature": 0}
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: "
        self._done, self._first_s = asyncio.get_running_loop().create_future(), 0.0
        began_s = time.perf_counter()
        write(self._transport, f"{head}{len(body)}\r\n\r\n".encode() + body)
        answer = await self._done
        if b"[DONE]" not in answer:
            raise ConnectionError(f"no answer: {answer[:300]!r}")
        return Timed(self._first_s - began_s, time.perf_counter() - began_s)

    def _more(self, data: bytes) -> None:
        self._first_s = self._first_s or time.perf_counter()

    def _end(self, head: bytes, body: bytes) -> None:
        assert self._done is not None
        self._done.set_result(head + body)


def sdk_line(client: RouterClient, prompt_tokens: int) -> Line:
    """By token ids, through the SDK's router client."""

    async def ask(num_tokens: int) -> Timed:
        request = _request(prompt_tokens, num_tokens)
        began_s, first_s = time.perf_counter(), 0.0
        async with aclosing(client.generate(request, TIMEOUT_S)) as outputs:
            async for _ in outputs:
                first_s = first_s or time.perf_counter()
        return Timed(first_s - began_s, time.perf_counter() - began_s)

    async def make() -> Ask:
        return ask

    return make


def unrouted_line(channels: ChannelPool, decode: WorkerAddress, prefill: WorkerAddress, prompt_tokens: int) -> Line:
    """By token ids, straight to a decode worker: what there is without a router."""
    session = DecodeSession(channels.get(decode.address), decode.worker_id, decode.address)
    signer = RouteSigner("")

    async def ask(num_tokens: int) -> Timed:
        request = _request(prompt_tokens, num_tokens)
        began_s, first_s = time.perf_counter(), 0.0
        message = codec.encode_generation_request(request, int(TIMEOUT_S * 1e3))
        route = inference_pb2.Route(
            request_id=request.request_id,
            attempt=1,
            decode=encode_address(decode),
            prefill=encode_address(prefill),
            tenant=request.tenant,
        )
        signed = signer.sign(route, message.prompt_token_ids)
        async with session.routed(message, signed, 1, (), timeout_s=TIMEOUT_S) as replies:
            ended = False
            while not ended:
                ended = session.step_of(await replies.get()).finish_reason is not None
                first_s = first_s or time.perf_counter()
        return Timed(first_s - began_s, time.perf_counter() - began_s)

    async def make() -> Ask:
        return ask

    return make


def _request(prompt_tokens: int, num_tokens: int) -> GenerationRequest:
    """Of a prompt that no other has the beginning of."""
    number = next(_numbers)
    prompt = np.full(prompt_tokens, TOKEN, np.int32)
    prompt[:2] = number % 1000, number // 1000 % 1000
    return GenerationRequest(f"bench-{number}", "mock", prompt, SamplingParams(num_tokens, ignore_eos=True))
