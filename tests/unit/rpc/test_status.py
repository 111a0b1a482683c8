from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sagellm_common.core.errors import (
    ERRORS,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    PeerLost,
    QueueFull,
    SageError,
)
from sagellm_common.rpc.status import from_rpc_error, from_status, to_status


@pytest.mark.parametrize("cls", ERRORS.values(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("retry_after_s", [None, 0.25, 3.0])
def test_every_error_survives_the_wire(cls: type[SageError], retry_after_s: float | None) -> None:
    sent = cls("what – and the fix", metadata={"field": "top_p"}, retry_after_s=retry_after_s)
    status = status_pb2.Status.FromString(to_status(sent).SerializeToString())
    assert status.code == getattr(grpc.StatusCode, cls.code).value[0]
    received = from_status(status)
    assert type(received) is cls
    assert (received.message, received.metadata, received.retry_after_s) == (
        sent.message,
        sent.metadata,
        sent.retry_after_s,
    )


def test_it_is_the_standard_form() -> None:
    info, retry = to_status(QueueFull("full", retry_after_s=0.5)).details
    error_info, retry_info = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert info.Unpack(error_info) and retry.Unpack(retry_info)
    assert (error_info.domain, error_info.reason) == ("sagellm", "QUEUE_FULL")
    assert retry_info.retry_delay.ToMilliseconds() == 500


def test_an_untyped_error_shows_nothing_of_itself() -> None:
    status = to_status(KeyError("secret"))
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert b"secret" not in status.SerializeToString()
    assert type(from_status(status)) is Internal


def test_a_reason_of_a_newer_peer_is_internal() -> None:
    status = to_status(InvalidRequest("m"))
    info = error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="sagellm")
    status.details[0].Pack(info)
    assert type(from_status(status)) is Internal


def test_another_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="example.com"))
    assert type(from_status(status)) is PeerLost


def test_a_message_too_long_for_trailers_is_cut() -> None:
    message = to_status(InvalidRequest("x" * 100_000)).message
    assert len(message) < 2000
    assert message.endswith("…")


def rpc_error(code: grpc.StatusCode, details: str, *trailers: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, Internal),
        (grpc.StatusCode.UNKNOWN, Internal),
    ],
)
def test_gRPC_errors_of_its_own(code: grpc.StatusCode, cls: type[SageError]) -> None:
    err = from_rpc_error(rpc_error(code, "socket closed"))
    assert type(err) is cls
    assert err.message == f"{code.name}: socket closed"


def test_a_peers_error_comes_from_its_trailers() -> None:
    sent = rpc_status.to_status(to_status(QueueFull("full", retry_after_s=1.0)))
    err = from_rpc_error(rpc_error(sent.code, sent.details, *sent.trailing_metadata))
    assert type(err) is QueueFull
    assert err.retry_after_s == 1.0


def test_trailers_that_contradict_the_call_are_not_believed() -> None:
    sent = rpc_status.to_status(to_status(QueueFull("full")))
    err = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "proxy gone", *sent.trailing_metadata))
    assert type(err) is PeerLost
