"""Named places at which a test can make something happen. They cost one comparison unless a test arms one.

Between processes: SAGELLM_FAILPOINTS names a directory. A process that passes `hit("decode.pulling")` and finds a file
`decode.pulling` (or `decode.pulling@<worker id>`) there removes it and gets the signal the file names, SIGKILL if it is
empty: no cleanup runs, as with a crashed machine, and a restarted process passes. A file that says `delay_ms=5` stays,
and whoever passes takes so much longer: a regression, planted. Within one: `armed` calls a function.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DELAY = "delay_ms="
_DIRECTORY = os.environ.get("SAGELLM_FAILPOINTS", "")
_worker_id = ""
_actions: dict[str, Callable[[], None]] = {}


def name_process(worker_id: str) -> None:
    """Lets failpoints be armed for this process alone."""
    global _worker_id
    _worker_id = worker_id


@contextmanager
def armed(name: str, action: Callable[[], None]) -> Iterator[None]:
    """For the time of the block the first to pass `name` calls `action`, on whatever thread that is."""
    _actions[name] = action
    try:
        yield
    finally:
        _actions.pop(name, None)


def hit(name: str) -> None:
    if not _DIRECTORY and not _actions:
        return
    action = _actions.pop(name, None)
    if action is not None:
        action()
    for armed_name in (name, f"{name}@{_worker_id}") if _DIRECTORY else ():
        file = Path(_DIRECTORY) / armed_name
        try:
            number = file.read_text()
            if number.startswith(DELAY):
                time.sleep(float(number.removeprefix(DELAY)) / 1e3)
                continue
            file.unlink()
        except FileNotFoundError:
            continue
        os.kill(os.getpid(), signal.Signals[number or "SIGKILL"])
