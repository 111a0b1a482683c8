"""Which attempt of a request runs here: one, the newest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sagellm_common.comm_backend.handoff import Party
from sagellm_common.core.errors import Cancelled, InvalidRequest, LeaseExpired, SageError


@dataclass(slots=True, eq=False)
class _Entry:
    attempt: int
    task: asyncio.Task[object]
    reason: SageError | None = None
    handing_over: bool = False

    def end(self, reason: SageError) -> None:
        if self.reason is None:
            self.reason = reason
            self.task.cancel()


class RunningRequests:
    """Requests by id, each run by the task that entered it."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def enter(self, request_id: str, attempt: int) -> Iterator[None]:
        """For the time of the block this attempt is the running one; an older one is ended.

        Raises LeaseExpired for an older attempt than the running one, InvalidRequest for the same; and, out of the
        block, whatever reason the attempt was ended with.
        """
        known = self._entries.get(request_id)
        if known is not None and known.attempt > attempt:
            raise LeaseExpired(f"request {request_id} attempt {attempt} was superseded by attempt {known.attempt}")
        if known is not None and known.attempt == attempt:
            raise InvalidRequest(f"request {request_id} attempt {attempt} is being decoded already")
        if known is not None:
            known.end(LeaseExpired(f"request {request_id} attempt {known.attempt} was superseded by {attempt}"))
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        entry = self._entries[request_id] = _Entry(attempt, task)
        try:
            yield
        except asyncio.CancelledError:
            # As asyncio.timeout does: our own cancellation becomes an error, anybody else's stays one.
            if entry.reason is not None and task.uncancel() <= cancelling:
                raise entry.reason from None
            raise
        finally:
            if self._entries.get(request_id) is entry:
                del self._entries[request_id]

    def hand_over(self, request_id: str, attempt: int) -> bool:
        """Notes that this attempt is to end here and go on elsewhere; False when it does not run."""
        entry = self._entries.get(request_id)
        if entry is None or entry.attempt != attempt:
            return False
        entry.handing_over = True
        return True

    def handing_over(self, request_id: str) -> bool:
        """Whether the running attempt is to end here."""
        return self._entries[request_id].handing_over

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Ends this attempt or an older one with Cancelled. A no-op for unknown ones."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.attempt <= attempt:
            entry.end(Cancelled(f"request {request_id} was cancelled by the {by}", metadata={"by": by}))
