"""Waits that cannot be aborted, on threads that do not keep the process alive."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_daemon_thread(name: str, work: Callable[[], T]) -> asyncio.Future[T]:
    """Runs `work` on a thread of its own; the future has its result or error.

    Unlike an executor's, the thread is not waited for when the interpreter ends. Cancelling the future leaves the
    thread alone: what it does afterwards must not matter.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T allows it

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as err:  # noqa: BLE001  # handed to whoever awaits the future
            error = err
        # The loop may be gone by now, and with it whoever wanted to know.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def finished(job: asyncio.Future[Any]) -> None:
    """Waits for a job that nothing stops, or that was told to end, through any cancellation: the caller re-raises."""
    while not job.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([job])
    if not job.cancelled():
        job.exception()
