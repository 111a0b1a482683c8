"""Waiting for what others bring about, with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TIMEOUT_S = 10.0


async def eventually(condition: Callable[[], object], what: Callable[[], str] = lambda: "it never came true") -> None:
    """Returns once `condition` holds; fails with `what` past the deadline."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - state without an event of its own
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(what()) from None
