from __future__ import annotations

import asyncio

import pytest

from sagellm_common.comm_backend.handoff_reason import HandoffReason, reason_of
from sagellm_common.core.errors import (
    ERRORS,
    Cancelled,
    DeadlineExceeded,
    EpochFenced,
    KvCorrupt,
    LeaseExpired,
    PeerLost,
)
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2
from services.cli.doctor import _ADVICE


def lost_by(cause: BaseException) -> PeerLost:
    error = PeerLost("lost")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "bytes_here", "reason"),
    [
        (lost_by(ConnectionRefusedError()), 0, HandoffReason.CONNECT_REFUSED),
        (lost_by(TimeoutError()), 7, HandoffReason.STALLED),
        (lost_by(EOFError()), 0, HandoffReason.PEER_LOST_BEFORE_FIRST_BYTE),
        (lost_by(ConnectionResetError()), 1, HandoffReason.PEER_LOST_AFTER_FIRST_BYTE),
        (LeaseExpired("late"), 0, HandoffReason.LEASE_EXPIRED),
        (EpochFenced("fenced"), 0, HandoffReason.EPOCH_FENCED),
        (KvCorrupt("bits"), 9, HandoffReason.DIGEST_MISMATCH),
        (DeadlineExceeded("over"), 9, HandoffReason.DEADLINE),
        (asyncio.CancelledError(), 0, HandoffReason.CANCELLED_BY_ROUTER),
        (Cancelled("over", metadata={"by": "router"}), 0, HandoffReason.CANCELLED_BY_ROUTER),
        (Cancelled("over", metadata={"by": "client"}), 0, HandoffReason.CANCELLED_BY_CLIENT),
        (ZeroDivisionError(), 0, HandoffReason.INTERNAL),
    ],
    ids=str,
)
def test_each_error_has_its_reason(error: BaseException, bytes_here: int, reason: HandoffReason) -> None:
    assert reason_of(error, bytes_here) is reason


def test_every_typed_error_has_a_reason() -> None:
    """One that falls through to INTERNAL is one of those that no handoff raises."""
    untold = {name for name, error in ERRORS.items() if reason_of(error("x")) is HandoffReason.INTERNAL}
    assert untold == {
        "INTERNAL",
        "NO_WORKER",
        "TENANT_QUOTA",
        "UNKNOWN_MODEL",
        "WORKER_ID_TAKEN",
        "WRONG_ROLE",
    }


def test_the_set_is_closed_on_the_wire_and_in_the_doctor() -> None:
    names = {name.removeprefix("HANDOFF_REASON_") for name, _ in worker_pb2.HandoffReason.items()}
    assert names == {reason.name for reason in HandoffReason} | {"UNSPECIFIED"}
    assert set(_ADVICE) == set(HandoffReason)
