"""The thread an engine loads and computes on, and how it speaks to the event loop that started it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from sagellm_common.engines.base import SequenceOutput, StepCallback

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0

Main = Callable[[StepCallback, Future[None]], None]
"""(emit, ready): resolves `ready` once it is loaded, or puts its error there; calls `emit` with each step's outputs."""


def start_thread(
    name: str, main: Main, on_step: StepCallback, ended: asyncio.Event
) -> tuple[threading.Thread, Future[None]]:
    """Runs `main`; `on_step` and, when it has returned, `ended.set` are called on the running event loop.

    Returns the thread and `ready`, to be awaited.
    """
    caller = asyncio.get_running_loop()
    ready: Future[None] = Future()

    def emit(outputs: Sequence[SequenceOutput]) -> None:
        caller.call_soon_threadsafe(on_step, outputs)

    def run() -> None:
        try:
            main(emit, ready)
        finally:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
                caller.call_soon_threadsafe(ended.set)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread, ready


async def join_thread(thread: threading.Thread) -> None:
    """Waits for a thread that was told to end; one that does not is told of in the log."""
    await asyncio.to_thread(thread.join, CLOSE_TIMEOUT_S)
    if thread.is_alive():
        log.error("the engine thread did not end within %.0f s", CLOSE_TIMEOUT_S)
