"""Outgoing calls: one channel per peer, a deadline on every call, errors typed, the trace carried along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from sagellm_common.core.errors import PeerLost
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.rpc.status import from_rpc_error

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0
"""A peer that was silent for the first is asked for a sign of life, and lost if the second passes without any."""

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a reset is noticed within 15 s, even on a silent session.
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted worker is back within a second; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class ChannelPool:
    """One lazily connecting channel per address. gRPC sets TCP_NODELAY on all of them."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `host:port`, shared by all callers; they must not close it."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=_OPTIONS)
        return channel

    async def drop(self, address: str) -> None:
        """Closes the channel of a peer that is gone for good; its calls in flight are cancelled."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close(None)

    async def close(self) -> None:
        """Closes all channels; calls in flight are cancelled. Idempotent."""
        while self._channels:
            await self.drop(next(iter(self._channels)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The current trace as call metadata (`traceparent`)."""
    return tuple(current_carrier().items())


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Turns what gRPC raises inside the block into SageErrors. The caller's own cancellation passes."""
    try:
        yield
    except grpc.aio.AioRpcError as err:
        raise from_rpc_error(err) from err
    except grpc.aio.UsageError as err:
        raise PeerLost("the connection has been closed") from err
    except asyncio.CancelledError as err:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # gRPC says CancelledError also when the channel was closed underneath the call.
        raise PeerLost("the connection was closed during the call") from err


async def call(method: Callable[..., Any], request: Any, *, timeout_s: float, response: type[T] | None = None) -> T:
    """One unary call. Raises the SageError the peer sent, PeerLost, DeadlineExceeded.

    `response` only tells the type checker what comes back: generated stubs are untyped.
    """
    with rpc_errors():
        result: T = await method(request, timeout=timeout_s, metadata=trace_metadata())
    return result


async def stream(
    method: Callable[..., Any], request: Any, *, timeout_s: float | None, response: type[T] | None = None
) -> AsyncGenerator[T, None]:
    """The messages of one server-streaming call; errors as `call`. Leaving the iteration cancels the call.

    Iterate under `contextlib.aclosing`, so that leaving early cancels at once. `timeout_s` bounds the whole
    stream; None is for watches, which end with their peer (keepalive notices a silent one).
    """
    with rpc_errors():
        rpc = method(request, timeout=timeout_s, metadata=trace_metadata())
        try:
            async for message in rpc:
                yield message
        finally:
            rpc.cancel()
