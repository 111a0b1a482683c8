"""Named places at which a test can kill a process. They cost one comparison unless SAGELLM_FAILPOINTS is set.

SAGELLM_FAILPOINTS names a directory. A process that passes `hit("decode.pulling")` and finds a file
`decode.pulling` (or `decode.pulling@<worker id>`) there removes it and dies by SIGKILL: no cleanup runs, as with a
crashed machine, and a restarted process passes.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_DIRECTORY = os.environ.get("SAGELLM_FAILPOINTS", "")
_worker_id = ""


def name_process(worker_id: str) -> None:
    """Lets failpoints be armed for this process alone."""
    global _worker_id
    _worker_id = worker_id


def hit(name: str) -> None:
    if not _DIRECTORY:
        return
    for armed in (name, f"{name}@{_worker_id}"):
        try:
            (Path(_DIRECTORY) / armed).unlink()
        except FileNotFoundError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
