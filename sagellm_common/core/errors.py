"""One tree of errors and the one table that maps it to the wire.

    SageError
    ├── InvalidRequest          INVALID_REQUEST     INVALID_ARGUMENT
    │   └── ContextTooLong      CONTEXT_TOO_LONG    INVALID_ARGUMENT
    ├── UnknownModel            UNKNOWN_MODEL       NOT_FOUND
    ├── Overloaded
    │   ├── QueueFull           QUEUE_FULL          RESOURCE_EXHAUSTED  retry
    │   ├── KvExhausted         KV_EXHAUSTED        RESOURCE_EXHAUSTED  retry
    │   └── TenantQuota         TENANT_QUOTA        RESOURCE_EXHAUSTED  retry
    ├── Unreachable
    │   ├── NoWorker            NO_WORKER           UNAVAILABLE         retry
    │   ├── Draining            DRAINING            UNAVAILABLE         retry
    │   └── PeerLost            PEER_LOST           UNAVAILABLE         retry
    │       └── PeerRestarted   PEER_RESTARTED      UNAVAILABLE         retry
    ├── LayoutMismatch          LAYOUT_MISMATCH     FAILED_PRECONDITION
    ├── WrongRole               WRONG_ROLE          FAILED_PRECONDITION
    ├── WorkerIdTaken           WORKER_ID_TAKEN     ALREADY_EXISTS
    ├── LeaseExpired            LEASE_EXPIRED       ABORTED             retry
    │   └── EpochFenced         EPOCH_FENCED        ABORTED             retry
    ├── KvCorrupt               KV_CORRUPT          DATA_LOSS           retry
    ├── DeadlineExceeded        DEADLINE_EXCEEDED   DEADLINE_EXCEEDED
    ├── Cancelled               CANCELLED           CANCELLED
    ├── ConfigError             INVALID_CONFIG      FAILED_PRECONDITION
    ├── EngineFailed            ENGINE_FAILED       INTERNAL            retry
    └── Internal                INTERNAL            INTERNAL

`reason` goes out as `ErrorInfo.reason` of domain `sagellm`; code names are those of gRPC, kept as strings
because `core` knows no gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

DOMAIN = "sagellm"


class SageError(Exception):
    """Base of all typed errors. `message` is for the client: it names the field, the value and the fix.

    `metadata` holds machine-readable details (strings), `retry_after_s` the delay after which trying again
    makes sense; None where it does not.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, metadata: Mapping[str, str] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidRequest(SageError):
    reason, code = "INVALID_REQUEST", "INVALID_ARGUMENT"


class ContextTooLong(InvalidRequest):
    reason = "CONTEXT_TOO_LONG"


class UnknownModel(SageError):
    reason, code = "UNKNOWN_MODEL", "NOT_FOUND"


class Overloaded(SageError):
    """Too much work for now. Never raised itself."""

    code, retryable = "RESOURCE_EXHAUSTED", True


class QueueFull(Overloaded):
    reason = "QUEUE_FULL"


class KvExhausted(Overloaded):
    reason = "KV_EXHAUSTED"


class TenantQuota(Overloaded):
    reason = "TENANT_QUOTA"


class Unreachable(SageError):
    """Nobody there to do the work. Never raised itself."""

    code, retryable = "UNAVAILABLE", True


class NoWorker(Unreachable):
    reason = "NO_WORKER"


class Draining(Unreachable):
    reason = "DRAINING"


class PeerLost(Unreachable):
    reason = "PEER_LOST"


class PeerRestarted(PeerLost):
    """It is there again, but what it held for us is gone."""

    reason = "PEER_RESTARTED"


class LayoutMismatch(SageError):
    reason, code = "LAYOUT_MISMATCH", "FAILED_PRECONDITION"


class WrongRole(SageError):
    reason, code = "WRONG_ROLE", "FAILED_PRECONDITION"


class WorkerIdTaken(SageError):
    reason, code = "WORKER_ID_TAKEN", "ALREADY_EXISTS"


class LeaseExpired(SageError):
    reason, code, retryable = "LEASE_EXPIRED", "ABORTED", True


class EpochFenced(LeaseExpired):
    """A newer attempt, or a newer request of the same id, has taken the lease's place."""

    reason = "EPOCH_FENCED"


class KvCorrupt(SageError):
    reason, code, retryable = "KV_CORRUPT", "DATA_LOSS", True


class DeadlineExceeded(SageError):
    reason, code = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


class Cancelled(SageError):
    reason, code = "CANCELLED", "CANCELLED"


class ConfigError(SageError):
    reason, code = "INVALID_CONFIG", "FAILED_PRECONDITION"


class EngineFailed(SageError):
    reason, code, retryable = "ENGINE_FAILED", "INTERNAL", True


class Internal(SageError):
    """Anything untyped, as the other side sees it: without the exception's text."""


def _leaves(cls: type[SageError]) -> dict[str, type[SageError]]:
    table = {} if cls in (SageError, Overloaded, Unreachable) else {cls.reason: cls}
    for sub in cls.__subclasses__():
        table |= _leaves(sub)
    return table


ERRORS: Mapping[str, type[SageError]] = _leaves(SageError)
"""reason → class. The only table; encoding reads the class attributes, decoding looks up here."""


def error_for(
    reason: str, message: str, metadata: Mapping[str, str] | None = None, retry_after_s: float | None = None
) -> SageError:
    """The error a peer sent. An unknown reason (a newer peer's) becomes Internal."""
    return ERRORS.get(reason, Internal)(message, metadata=metadata, retry_after_s=retry_after_s)
