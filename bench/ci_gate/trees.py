"""Trees to compare: a directory, or a revision in a git worktree for the time; and their `bench run --turns`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sagellm_common.core.errors import ConfigError

START_TIMEOUT_S = 300.0
"""The first one may have to convert the model's weights."""
ROUND_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
GIT_TIMEOUT_S = 60.0
BUILD_TIMEOUT_S = 300.0
LINE_LIMIT_BYTES = 1 << 20
NATIVE = (
    "sagellm_common.engines.lmdeploy.kernels.build",
    "sagellm_common.comm_backend.native",
    "sagellm_common.prefix_reuse.native",
)
"""What `make setup` compiles; nothing happens where it was compiled already."""


class TurnFailed(Exception):
    """A tree's runner ended or did not answer."""


@contextmanager
def tree(name: str) -> Iterator[Path]:
    """A directory as it is, or a git revision checked out. Raises ConfigError for neither."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except ConfigError as err:
        raise ConfigError(f"{name!r} is no directory, no file and no git revision here") from err
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "tree"
        _git("worktree", "add", "--detach", "--quiet", str(target), commit)
        try:
            yield target
        finally:
            _git("worktree", "remove", "--force", str(target))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as err:
        said = getattr(err, "stderr", "") or str(err)
        raise ConfigError(f"git {' '.join(arguments)}: {said.strip()}") from err
    return done.stdout


def environment(root: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The tree's own code before anything installed."""
    return {**os.environ, "PYTHONPATH": str(root), **extra}


def build(root: Path) -> None:
    """Compiles what the tree has of native code; without a compiler Python does the same on both sides."""
    for module in NATIVE:
        if root.joinpath(*module.split(".")).with_suffix(".py").exists() or root.joinpath(*module.split(".")).is_dir():
            subprocess.run(
                [sys.executable, "-m", module, "--optional"],
                cwd=root,
                env=environment(root, {}),
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=BUILD_TIMEOUT_S,
            )


class Runner:
    """One tree's cluster, kept up between its turns."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process

    async def round(self, number: int) -> dict[str, float]:
        """Raises TurnFailed."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended: its output says so
            self._process.stdin.write(f"{number}\n".encode())
            await self._process.stdin.drain()
        found: dict[str, float] = await self.line(ROUND_TIMEOUT_S)
        return found

    async def line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise TurnFailed(f"{self._name}: no answer within {timeout_s:g} s") from None
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            what = f"said {line[:200]!r}" if line else "ended"
            raise TurnFailed(f"{self._name}: `bench run --turns` {what}; does this tree have it?") from None
        return found


@asynccontextmanager
async def runner(
    name: str, root: Path, preset: str, peak_flops: float, extra: Mapping[str, str]
) -> AsyncIterator[Runner]:
    """Ready, for the time of the block. Raises TurnFailed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench", "run", "--preset", preset, "--turns", "--peak-flops", str(peak_flops)),
        cwd=root,
        env=environment(root, extra),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_LIMIT_BYTES,
    )
    assert process.stdin is not None
    try:
        made = Runner(name, process)
        await made.line(START_TIMEOUT_S)
        yield made
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
