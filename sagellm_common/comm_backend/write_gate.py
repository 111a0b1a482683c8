"""Between a thread that nobody can stop and blocks that it must not write into any more."""

from __future__ import annotations

import threading


class WriteGate:
    """Lets a thread write into blocks until their owner shuts it; after `shut` returns nothing is written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.open = True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def shut(self) -> None:
        with self._lock:
            self.open = False
