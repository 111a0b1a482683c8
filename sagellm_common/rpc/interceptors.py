"""What every call of every service gets: typed errors, a span, metrics. The servicers know nothing of it.

measured( traced( errors_to_status( handler ) ) )

A session is one call to gRPC and many to its client: its servicer wraps each of them in `session_call`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import grpc
from prometheus_client import Counter, Histogram
from pydantic import ValidationError

from sagellm_common.core.errors import Internal, InvalidRequest, SageError
from sagellm_common.core.telemetry import span
from sagellm_common.rpc.status import abort

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

REQUESTS = Counter("sagellm_rpc_requests", "Calls served, by their outcome.", ["service", "method", "code"])
DURATION = Histogram(
    "sagellm_rpc_duration_seconds",
    "Duration of calls, streams included.",
    ["service", "method"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)


@dataclass(frozen=True, slots=True)
class Call:
    service: str
    method: str
    context: Context
    request_id: str
    is_session: bool

    @property
    def code(self) -> grpc.StatusCode:
        """The status set so far; gRPC keeps it as a number until the call ends."""
        number = self.context.code()
        return next((c for c in grpc.StatusCode if number in (c, c.value[0])), grpc.StatusCode.OK)


def _typed(err: Exception, service: str, method: str, request_id: str) -> SageError:
    """The error a client is told; one that nobody expected is logged."""
    if isinstance(err, SageError):
        return err
    if isinstance(err, ValidationError):
        return InvalidRequest("; ".join(e["msg"] for e in err.errors()))
    log.error("%s/%s failed, request_id=%s", service, method, request_id or "-", exc_info=err)
    return Internal("internal error; the server's log has the details")


@asynccontextmanager
async def errors_to_status(call: Call) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as err:  # noqa: BLE001 - the client gets its status, `_typed` logs it
        await abort(call.context, _typed(err, call.service, call.method, call.request_id))


class counted_call:
    """The same for a call that gRPC does not see: an error of the block goes to `refuse`.

    A class, for a generator costs as much as the rest of a short call.
    """

    __slots__ = ("_began_s", "_method", "_refuse", "_request_id", "_service")

    def __init__(self, service: str, method: str, request_id: str, refuse: Callable[[SageError], None]) -> None:
        self._service = service
        self._method = method
        self._request_id = request_id
        self._refuse = refuse

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> bool:
        """True where the error is told: it ends here."""
        told, code = False, grpc.StatusCode.OK.name
        if isinstance(err, Exception):
            error = _typed(err, self._service, self._method, self._request_id)
            self._refuse(error)
            told, code = True, error.code
        elif err is not None:
            code = grpc.StatusCode.CANCELLED.name
        requests, duration = _counters(self._service, self._method, code)
        requests.inc()
        duration.observe(time.perf_counter() - self._began_s)
        return told


@lru_cache(maxsize=1024)  # looking up labels costs more than counting
def _counters(service: str, method: str, code: str) -> tuple[Counter, Histogram]:
    return REQUESTS.labels(service, method, code), DURATION.labels(service, method)


class session_call(counted_call):
    """One call of a session, counted and traced as the plain `method`."""

    __slots__ = ("_span",)

    def __init__(
        self,
        service: str,
        method: str,
        request_id: str,
        carrier: Mapping[str, str],
        refuse: Callable[[SageError], None],
    ) -> None:
        super().__init__(service, method, request_id, refuse)
        name = f"{service}/{method}"
        self._span = span(name, carrier, **{"rpc.system": "grpc", "request_id": request_id})

    def __enter__(self) -> None:
        super().__enter__()
        self._span.__enter__()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> bool:
        self._span.__exit__(kind, err, tb)
        return super().__exit__(kind, err, tb)


@asynccontextmanager
async def traced(call: Call) -> AsyncIterator[None]:
    """A span per call. None for a session, which outlives its requests and carries their contexts itself."""
    if call.is_session or not call.service.startswith("sagellm."):
        yield
        return
    carrier = {key: value for key, value in call.context.invocation_metadata() or () if isinstance(value, str)}
    with span(f"{call.service}/{call.method}", carrier, **{"rpc.system": "grpc", "request_id": call.request_id}):
        yield


@asynccontextmanager
async def measured(call: Call) -> AsyncIterator[None]:
    begin = time.perf_counter()
    code = grpc.StatusCode.OK
    try:
        yield
        code = call.code
    except asyncio.CancelledError:
        code = grpc.StatusCode.CANCELLED
        raise
    except BaseException:
        code = call.code
        raise
    finally:
        REQUESTS.labels(call.service, call.method, code.name).inc()
        DURATION.labels(call.service, call.method).observe(time.perf_counter() - begin)


class ServiceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # an unknown method: gRPC answers UNIMPLEMENTED
        _, service, method = handler_call_details.method.split("/")
        kind = "_".join("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
        inner = getattr(handler, kind)
        is_session = handler.request_streaming

        async def behaviour(request: Any, context: Context) -> Any:
            call = Call(service, method, context, getattr(request, "request_id", ""), is_session)
            async with measured(call), traced(call), errors_to_status(call):
                return await run_handler(inner, request, context)

        make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(behaviour, handler.request_deserializer, handler.response_serializer)


async def run_handler(inner: Callable[..., Any], request: Any, context: Any) -> Any:
    """Runs a handler to its end, as a coroutine.

    gRPC itself leaves a cancelled generator to the garbage collector; driven from here, its `finally` blocks run
    at once, in the task and context of the call.
    """
    result = inner(request, context)
    if inspect.isasyncgen(result):
        async with aclosing(result) as responses:
            async for response in responses:
                await context.write(response)
        return None
    return await result
