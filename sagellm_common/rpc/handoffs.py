"""Handoff records on the wire, and asking a worker for them."""

from __future__ import annotations

import grpc

from sagellm_common.comm_backend.handoff import Party, Side
from sagellm_common.comm_backend.handoff_reason import HandoffReason
from sagellm_common.comm_backend.handoff_record import HandoffEvent, HandoffRecord, State
from sagellm_common.rpc.channels import call
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc

_SAME = (
    *("request_id", "attempt", "epoch", "backend", "backend_why", "peer_id", "peer_incarnation", "failed_at"),
    *("message", "queued_ms", "handshake_ms", "first_byte_ms", "transfer_ms", "exposed_ms", "digest_ms", "bytes"),
    *("blocks_moved", "blocks_reused", "stalls", "longest_stall_ms", "retries", "overlap_share", "total_ms", "age_ms"),
)
"""Fields that have one name and type on either side."""


async def list_handoffs(
    channel: grpc.aio.Channel, *, request_id: str = "", last: int = 0, failed: bool = False, timeout_s: float
) -> tuple[str, list[HandoffRecord]]:
    """The worker's incarnation and what it remembers, oldest first. Raises PeerLost, DeadlineExceeded."""
    request = worker_pb2.ListHandoffsRequest(request_id=request_id, last=last, failed=failed)
    method = worker_pb2_grpc.WorkerServiceStub(channel).ListHandoffs
    response = await call(method, request, timeout_s=timeout_s, response=worker_pb2.ListHandoffsResponse)
    return response.incarnation, [decode_record(record) for record in response.records]


def canceller(request: worker_pb2.CancelRequest | worker_pb2.ReleaseReservationRequest) -> Party:
    """On whose account."""
    return "client" if request.by_client else "router"


def encode_record(record: HandoffRecord) -> worker_pb2.HandoffRecord:
    reason = record.reason.name if record.reason is not None else "UNSPECIFIED"
    return worker_pb2.HandoffRecord(
        **{name: getattr(record, name) for name in _SAME},
        side=getattr(worker_pb2, f"HANDOFF_SIDE_{record.side.name}"),
        state=getattr(worker_pb2, f"HANDOFF_STATE_{record.state.name}"),
        reason=getattr(worker_pb2, f"HANDOFF_REASON_{reason}"),
        events=[worker_pb2.HandoffEvent(what=event.what, at_ms=event.at_ms) for event in record.events],
    )


def decode_record(message: worker_pb2.HandoffRecord) -> HandoffRecord:
    """A reason that a newer worker knows and we do not is INTERNAL."""
    known = {number: name.removeprefix("HANDOFF_REASON_") for name, number in worker_pb2.HandoffReason.items()}
    reason = HandoffReason[known.get(message.reason, "INTERNAL")] if message.reason else None
    return HandoffRecord(
        **{name: getattr(message, name) for name in _SAME},
        began_s=0.0,
        side=Side[worker_pb2.HandoffSide.Name(message.side).removeprefix("HANDOFF_SIDE_")],
        state=State[worker_pb2.HandoffState.Name(message.state).removeprefix("HANDOFF_STATE_")],
        reason=reason,
        events=[HandoffEvent(event.what, event.at_ms) for event in message.events],
    )
