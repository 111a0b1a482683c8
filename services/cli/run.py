"""A cluster in the foreground, or under a supervisor of its own in the background."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError
from services.cli import models, render
from services.cli.cluster import Cluster, stop_grace_s
from services.cli.home import ClusterHome
from services.cli.process import process_runs
from services.cli.status import running_state

POLL_S = 0.05


class Interrupted(Exception):
    """Told to stop before the cluster served."""


def resolve_config(path: Path | None, overrides: Sequence[str] = (), name: str = "") -> Config:
    """The configuration, with a model that is there: prepared first if none was named. Raises ConfigError."""
    named = [f"cluster.name={name}"] if name else []
    config = load_config(path, os.environ, [*overrides, *named])
    model = Path(config.model.path).expanduser().resolve() if config.model.path else default_model()
    if not (model / "config.json").is_file():
        raise ConfigError(f"model.path {str(model)!r}: no config.json there; give a Hugging Face checkpoint directory")
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})})


def default_model() -> Path:
    with render.model_progress(render.err) as progress:
        return models.prepare_smollm2(progress=progress)


@asynccontextmanager
async def running(cluster: Cluster, view: render.StartupView, stopping: asyncio.Event) -> AsyncIterator[None]:
    """The cluster, serving, within the block; nothing of it is left behind the block.

    Raises StartFailed, ConfigError, and Interrupted when `stopping` is set before it serves.
    """
    with cluster.home.owned():
        start = asyncio.ensure_future(cluster.start())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            with view.shown():
                await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                raise Interrupted
            await start
            yield
        finally:
            for task in (start, stop):
                task.cancel()
            await asyncio.wait({start, stop})
            await cluster.stop()


def stop_on_signals(kill_all: Callable[[], None]) -> asyncio.Event:
    """Set by SIGINT or SIGTERM. A second one is for the impatient: it kills what still drains."""
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            kill_all()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopping


async def serve(cluster: Cluster, on_ready: Callable[[], Awaitable[None]]) -> None:
    """Runs the cluster until SIGINT or SIGTERM. Raises StartFailed, ConfigError, Interrupted."""
    view = render.StartupView(render.err)
    cluster.on_event = view.on_event
    stopping = stop_on_signals(cluster.kill_all)
    async with running(cluster, view, stopping):
        await on_ready()
        await stopping.wait()
        render.err.print("[dim]stopping[/]")


def detach_output(log: Path) -> None:
    """From now on this process writes to `log`: whoever started it does not listen any more."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(fd, stream.fileno())
    os.close(fd)


def up_detached(arguments: Sequence[str]) -> tuple[int, bytes]:
    """Starts `sagellm up --supervised ARGUMENTS` in a session of its own.

    Returns when it serves or has failed: its exit code (0 while it serves) and what it printed. It shows its progress
    and its errors on our stderr until then.
    """
    argv = [sys.executable, "-m", "services.cli", "up", "--supervised", *arguments]
    supervisor = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert supervisor.stdout is not None
    try:
        printed = supervisor.stdout.read()  # ends when it detaches its output, or itself
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise
    finally:
        supervisor.stdout.close()
    # One line on stdout means: serving.
    return (0, printed) if printed else (supervisor.wait(), printed)


def down(name: str) -> None:
    """Stops the cluster `name` and waits until nothing of it runs. Raises NotRunning."""
    home = ClusterHome(name)
    pid = running_state(name).pid
    _signal(pid, signal.SIGTERM)
    # Gateway, workers and router one after the other, each in the time that the supervisor gives it.
    deadline = time.monotonic() + 3 * stop_grace_s(load_config(home.config_file, {}))
    while home.running() or process_runs(pid):
        if time.monotonic() > deadline:
            if not home.running():
                return  # the cluster is gone: its process does something else now, or the pid is another's
            _signal(pid, signal.SIGKILL)  # its services die with it
        time.sleep(POLL_S)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
