"""The bound on requests in flight, and the way to cancel one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sagellm_common.core.errors import Draining, InvalidRequest, QueueFull
from services.router.calls import OpenCalls

RETRY_AFTER_S = 1.0
MAX_REQUEST_ID_CHARS = 256
"""Ids outlive their requests in logs and explanations."""


@dataclass(slots=True)
class Slot:
    """One request's place. `cancelled` is set by CancelGeneration, after its calls were cancelled; then `on_cancel` is
    called."""

    calls: OpenCalls
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    on_cancel: Callable[[], None] = lambda: None


class Admission:
    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._slots: dict[str, Slot] = {}
        self._draining = False
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._slots)

    @contextmanager
    def admit(self, request_id: str) -> Iterator[Slot]:
        """A place for the time of the block. Raises QueueFull, Draining, and InvalidRequest for an id in flight or one
        that is too long."""
        if self._draining:
            raise Draining("this router is stopping; try again at another", retry_after_s=RETRY_AFTER_S)
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"request_id has {len(request_id)} characters, but may have at most {MAX_REQUEST_ID_CHARS}",
                metadata={"field": "request_id"},
            )
        if request_id in self._slots:
            raise InvalidRequest(
                f"request_id {request_id!r} is in flight already; use a new one per request, or none",
                metadata={"field": "request_id"},
            )
        if len(self._slots) >= self._max_in_flight:
            raise QueueFull(
                f"{self._max_in_flight} requests are in flight, the most this router takes (router.max_queue); "
                "try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        slot = self._slots[request_id] = Slot(OpenCalls(request_id))
        try:
            yield slot
        finally:
            del self._slots[request_id]
            self._left.set()

    def cancel(self, request_id: str) -> bool:
        """Ends a request wherever it is; False when it is not in flight."""
        slot = self._slots.get(request_id)
        if slot is None:
            return False
        slot.calls.cancel()
        slot.cancelled.set()
        slot.on_cancel()
        return True

    async def drain(self) -> None:
        """Admits nobody any more; returns when nobody is left. The caller bounds the wait."""
        self._draining = True
        while self._slots:
            self._left.clear()
            await self._left.wait()
