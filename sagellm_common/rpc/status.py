"""Errors on the wire: `SageError` ↔ `google.rpc.Status` with one ErrorInfo, and RetryInfo where a delay is known.

The table is `core.errors`; nothing here knows a single error class beyond those a peer's silence stands for.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sagellm_common.core.errors import (
    DOMAIN,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    PeerLost,
    SageError,
    error_for,
)

_CODES: dict[str, int] = {code.name: code.value[0] for code in grpc.StatusCode}
_NAMES: dict[int, str] = {number: name for name, number in _CODES.items()}

_FOREIGN: dict[str, type[SageError]] = {
    "UNAVAILABLE": PeerLost,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "INVALID_ARGUMENT": InvalidRequest,
}
"""Codes that gRPC itself raises, without an ErrorInfo of ours."""

# Trailers hold the message twice and gRPC drops calls whose trailers exceed 8 KiB.
_MAX_MESSAGE_CHARS = 1500


def to_status(err: BaseException) -> status_pb2.Status:
    """What the other side may see of `err`: a SageError as it is, of anything else only that it happened."""
    if not isinstance(err, SageError):
        err = Internal("internal error; the server's log has the details")
    message = err.message
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[: _MAX_MESSAGE_CHARS - 1] + "…"
    status = status_pb2.Status(code=_CODES[err.code], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=err.reason, domain=DOMAIN, metadata=err.metadata))
    if err.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(err.retry_after_s * 1000))
        status.details.add().Pack(retry)
    return status


def from_status(status: status_pb2.Status) -> SageError:
    """The error a peer sent. One without our ErrorInfo is told by its code."""
    info: error_details_pb2.ErrorInfo | None = None
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            candidate = error_details_pb2.ErrorInfo()
            if detail.Unpack(candidate) and candidate.domain == DOMAIN:
                info = candidate
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    if info is not None:
        return error_for(info.reason, status.message, dict(info.metadata), retry_after_s)
    name = _NAMES.get(status.code, "UNKNOWN")
    return _FOREIGN.get(name, Internal)(f"{name}: {status.message}" if status.message else name)


def from_rpc_error(err: grpc.aio.AioRpcError) -> SageError:
    """The error a failed call stands for."""
    try:
        status: status_pb2.Status | None = rpc_status.from_call(cast(grpc.Call, err))
    except ValueError:
        # Trailers that contradict the call's status: a proxy failed the call after the peer had answered.
        status = None
    if status is None:
        status = status_pb2.Status(code=err.code().value[0], message=err.details() or "")
    return from_status(status)


async def abort(context: grpc.aio.ServicerContext[Any, Any], err: BaseException) -> NoReturn:
    """Ends the call with the rich status of `err`. Never returns: gRPC raises AbortError, which must pass."""
    status = rpc_status.to_status(to_status(err))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")
