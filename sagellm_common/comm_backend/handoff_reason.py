"""Why a handoff failed: a closed set, and the one table that says which error means which of them."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator

from sagellm_common.core.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EpochFenced,
    InvalidRequest,
    KvCorrupt,
    KvExhausted,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    PeerRestarted,
    QueueFull,
)


class HandoffReason(enum.StrEnum):
    CONNECT_REFUSED = "connect_refused"
    HANDSHAKE_REFUSED = "handshake_refused"
    """The two sides are configured for different byte paths."""
    LAYOUT_MISMATCH = "layout_mismatch"
    LEASE_EXPIRED = "lease_expired"
    EPOCH_FENCED = "epoch_fenced"
    PEER_RESTARTED = "peer_restarted"
    PEER_LOST_BEFORE_FIRST_BYTE = "peer_lost_before_first_byte"
    PEER_LOST_AFTER_FIRST_BYTE = "peer_lost_after_first_byte"
    STALLED = "stalled"
    """Connected, but silent for longer than transport.timeout_s."""
    DEADLINE = "deadline"
    DIGEST_MISMATCH = "digest_mismatch"
    CANCELLED_BY_CLIENT = "cancelled_by_client"
    """It asked for that, or left."""
    CANCELLED_BY_ROUTER = "cancelled_by_router"
    """On its own account: another party failed, or the deadline passed."""
    CANCELLED_BY_PREFILL = "cancelled_by_prefill"
    CANCELLED_BY_DECODE = "cancelled_by_decode"
    KV_EXHAUSTED = "kv_exhausted"
    QUEUE_FULL = "queue_full"
    """More pulls wait for their turn than transport.max_waiting_pulls."""
    DRAINING = "draining"
    ENGINE_FAILED = "engine_failed"
    INVALID_REQUEST = "invalid_request"
    INTERNAL = "internal"

    @property
    def cancelled(self) -> bool:
        return self.value.startswith("cancelled_by_")


REASONS: tuple[tuple[type[BaseException], HandoffReason], ...] = (
    (EpochFenced, HandoffReason.EPOCH_FENCED),
    (LeaseExpired, HandoffReason.LEASE_EXPIRED),
    (KvCorrupt, HandoffReason.DIGEST_MISMATCH),
    (LayoutMismatch, HandoffReason.LAYOUT_MISMATCH),
    (ConfigError, HandoffReason.HANDSHAKE_REFUSED),
    (KvExhausted, HandoffReason.KV_EXHAUSTED),
    (QueueFull, HandoffReason.QUEUE_FULL),
    (Draining, HandoffReason.DRAINING),
    (DeadlineExceeded, HandoffReason.DEADLINE),
    (Cancelled, HandoffReason.CANCELLED_BY_ROUTER),
    (asyncio.CancelledError, HandoffReason.CANCELLED_BY_ROUTER),
    (EngineFailed, HandoffReason.ENGINE_FAILED),
    (InvalidRequest, HandoffReason.INVALID_REQUEST),
    (PeerRestarted, HandoffReason.PEER_RESTARTED),
    # What a lost peer was lost by:
    (ConnectionRefusedError, HandoffReason.CONNECT_REFUSED),
    (TimeoutError, HandoffReason.STALLED),
)
"""The first that fits the error, or else what caused it. A PeerLost that none fits is told by how far it had come."""


def reason_of(error: BaseException, bytes_here: int = 0) -> HandoffReason:
    """What `error` means for a handoff of which bytes_here bytes had arrived."""
    for at in _with_causes(error):
        if isinstance(at, Cancelled) and at.metadata.get("by") == "client":
            return HandoffReason.CANCELLED_BY_CLIENT
        for kind, reason in REASONS:
            if isinstance(at, kind):
                return reason
    if isinstance(error, PeerLost):
        before, after = HandoffReason.PEER_LOST_BEFORE_FIRST_BYTE, HandoffReason.PEER_LOST_AFTER_FIRST_BYTE
        return after if bytes_here else before
    return HandoffReason.INTERNAL


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__
