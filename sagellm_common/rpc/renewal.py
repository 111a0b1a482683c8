"""Keeping a reservation while what it waits for is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sagellm_common.core.errors import LeaseExpired
from sagellm_common.core.types import HandoffTicket

MIN_RENEWAL_S = 0.05


@contextmanager
def renewed(ticket: HandoffTicket, renew: Callable[[str, int], object]) -> Iterator[None]:
    """Calls `renew(transfer_id, epoch)` for the time of the block: a long prompt is computed for longer than its
    reservation lasts. LeaseExpired ends it: the request finds out when it comes for the blocks."""
    loop, interval_s = asyncio.get_running_loop(), max(ticket.expires_in_ms / 3e3, MIN_RENEWAL_S)
    timer: asyncio.TimerHandle

    def again() -> None:
        nonlocal timer
        try:
            renew(ticket.transfer_id, ticket.epoch)
        except LeaseExpired:
            return
        timer = loop.call_later(interval_s, again)

    timer = loop.call_later(interval_s, again)
    try:
        yield
    finally:
        timer.cancel()
