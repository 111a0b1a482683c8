"""What a request has asked of workers and may still hold there."""

from __future__ import annotations

from typing import Protocol

from sagellm_common.core.errors import Cancelled
from services.router.workers import WorkerLink


class Undo(Protocol):
    def __call__(self, request_id: str, attempt: int, *, by_client: bool = False) -> None: ...


class OpenCalls:
    """Every call is entered before it is sent and left in until its worker is known to hold nothing for it.

    `settle` gives the rest back. It only queues messages, so it may stand in any `finally`; workers treat cancel and
    release of what they do not know as no-ops, so it may come too often but never too late.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._undo: dict[tuple[str, WorkerLink, int], Undo] = {}
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def reserving(self, link: WorkerLink, attempt: int) -> None:
        self._enter("reserve", link, attempt, link.decode.release)

    def prefilling(self, link: WorkerLink, attempt: int) -> None:
        """Covers the KV pinned there, too."""
        self._enter("prefill", link, attempt, link.prefill.cancel)

    def decoding(self, link: WorkerLink, attempt: int) -> None:
        self._enter("decode", link, attempt, link.decode.cancel)

    def finished(self) -> None:
        """The decode worker has ended the generation: it has claimed its reservation and released the prefill's pin."""
        self._undo.clear()

    def settle(self, *, keep: tuple[WorkerLink, int] | None = None, by_client: bool = False) -> None:
        """Cancels and releases everything but the attempt `keep` on that worker, whose KV is still wanted. Idempotent.

        Workers note in their handoffs' records whether it was the client who wanted that.
        """
        for (what, link, attempt), undo in list(self._undo.items()):
            if what != "reserve" and (link, attempt) == keep:
                continue
            del self._undo[what, link, attempt]
            undo(self._request_id, attempt, by_client=by_client)

    def cancel(self) -> None:
        """CancelGeneration: settles, which ends whatever call waits, and lets no further one begin."""
        self._cancelled = True
        self.settle(by_client=True)

    def check(self) -> None:
        """Raises Cancelled once `cancel` was called."""
        if self._cancelled:
            raise Cancelled(f"request {self._request_id} was cancelled")

    def _enter(self, what: str, link: WorkerLink, attempt: int, undo: Undo) -> None:
        self.check()
        self._undo[what, link, attempt] = undo
