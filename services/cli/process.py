"""One service as a child process: started, ready, watched, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Ready:
    """The JSON line a service prints when it serves. Addresses it does not have are empty."""

    id: str
    pid: int
    address: str
    data_address: str = ""
    metrics_address: str = ""

    @classmethod
    def parse(cls, line: bytes) -> Self | None:
        """None for any other line."""
        try:
            value = json.loads(line)
        except ValueError:
            return None
        if not isinstance(value, dict) or value.get("ready") is not True:
            return None
        addresses = {k: str(value.get(k) or "") for k in ("address", "data_address", "metrics_address")}
        return cls(id=str(value.get("id", "")), pid=int(value["pid"]), **addresses)


class ExitedEarly(Exception):
    """The process ended, or its time was up, before it served. `tail` is what it said last on stderr."""

    def __init__(self, reason: str, tail: Sequence[str]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.tail = tuple(tail)


class ServiceProcess:
    """Owns one process: it is dead when `stop` has returned. Also dies when this process is killed.

    Must be started on a thread that outlives it (the event loop's): the death signal follows the thread that forked.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._drain: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Self:
        """Output other than the ready line goes to `log`, appended."""
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                # Ctrl-C on the terminal is for us; we stop the services in order.
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()) if _libc else None,
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ready(self, timeout_s: float) -> Ready:
        """Waits for the ready line. Raises ExitedEarly."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                async for line in self._process.stdout:
                    if ready := Ready.parse(line):
                        self._drain = asyncio.create_task(self._drain_stdout())
                        return ready
                code = await self._process.wait()
        except TimeoutError:
            raise ExitedEarly(f"not ready within {timeout_s:g} s", tail(self._log)) from None
        raise ExitedEarly(describe_exit(code), tail(self._log))

    async def wait(self) -> int:
        """The return code; negative for a signal."""
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """A no-op when it is dead."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. Idempotent."""
        if self.running:
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
            except TimeoutError:
                self.signal(signal.SIGKILL)
        await self._process.wait()
        if self._drain:
            await self._drain

    async def _drain_stdout(self) -> None:
        # A full pipe would block the service.
        assert self._process.stdout is not None
        with self._log.open("ab") as log:
            async for line in self._process.stdout:
                log.write(line)


def _die_with(parent: int) -> Callable[[], None]:
    def set_death_signal() -> None:
        assert _libc is not None
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return set_death_signal


def tail(log: Path, lines: int = 12) -> list[str]:
    """The last lines of a log; empty when there is none."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        return file.read().decode(errors="replace").splitlines()[-lines:]


def describe_exit(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def process_runs(pid: int) -> bool:
    """False for a zombie too: it only waits for its parent to notice."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
