"""What one cluster keeps on disk, so that other commands find it.

$SAGELLM_HOME (~/.sagellm)/<cluster name>/
    lock         held by the supervisor while it lives; the truth about "is it running"
    state.json   addresses and pids
    config.yaml  what the services were started with
    logs/        one file per process
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from sagellm_common.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProcessState:
    id: str
    role: str
    pid: int
    address: str
    metrics_address: str = ""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """A cluster as its supervisor last wrote it. `ready` once all processes had served."""

    name: str
    pid: int
    model_path: str
    ready: bool = False
    gateway_url: str = ""
    router_address: str = ""
    processes: tuple[ProcessState, ...] = field(default=())


class AlreadyRunning(ConfigError):
    """Another supervisor holds the cluster's name."""


class ClusterHome:
    """The directory of the cluster `name`."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        if Path(name).name != name or name in (".", ".."):
            raise ConfigError(f"cluster.name {name!r}: use letters, digits, - and _")
        self.name = name
        self.path = (root or default_root()) / name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def log_file(self, process_id: str) -> Path:
        return self.path / "logs" / f"{process_id}.log"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Holds the cluster's lock and clears what the last run left. Raises AlreadyRunning."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            if not _try_lock(lock):
                raise AlreadyRunning(
                    f"cluster {self.name!r} is already running; "
                    f"`sagellm down --name {self.name}` stops it, --name starts another"
                )
            for left in ((self.path / "state.json"), *(self.path / "logs").glob("*.log")):
                left.unlink(missing_ok=True)
            try:
                yield
            finally:
                (self.path / "state.json").unlink(missing_ok=True)

    def running(self) -> bool:
        """Whether a supervisor lives."""
        try:
            with (self.path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def write(self, state: ClusterState) -> None:
        scratch = self.path / ".state.json"
        scratch.write_text(json.dumps(asdict(state), indent=2) + "\n")
        scratch.rename(self.path / "state.json")

    def read(self) -> ClusterState | None:
        """None when no supervisor lives or has not written yet."""
        if not self.running():
            return None
        try:
            value = json.loads((self.path / "state.json").read_text())
        except FileNotFoundError:
            return None
        processes = tuple(ProcessState(**process) for process in value.pop("processes"))
        return ClusterState(**value, processes=processes)


def _try_lock(file: IO[str]) -> bool:
    # `running` holds it for an instant.
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def default_root(env: Mapping[str, str] = os.environ) -> Path:
    return Path(env.get("SAGELLM_HOME") or Path.home() / ".sagellm")
