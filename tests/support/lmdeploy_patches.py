"""LMDeploy's stock tree, a patched overlay of it, and probes run on either in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "third_party" / "apply_patches.sh"
PATCHES = sorted((SCRIPT.parent / "patches" / "lmdeploy").glob("*.patch"))
PROBES_TIMEOUT_S = 100


def apply_patches(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def installed_tree() -> Path:
    """The folder that holds the installed `lmdeploy/`; imports nothing of it."""
    return Path(str(importlib.metadata.distribution("lmdeploy").locate_file("")))


def touched_files() -> list[str]:
    """The files that exist in the stock tree and are changed by a patch."""
    lines = [line for patch in PATCHES for line in patch.read_text().splitlines()]
    changed = {line.removeprefix("--- a/") for line in lines if line.startswith("--- a/")}
    created = {new.removeprefix("+++ b/") for old, new in pairwise(lines) if old == "--- /dev/null"}
    return sorted(changed - created)


def copy_of_stock(into: Path, files: Sequence[str] = ()) -> Path:
    """A copy of the installed tree without its libraries, or of some of its files; bytecode stays valid."""
    installed = installed_tree()
    if not files:
        shutil.copytree(installed / "lmdeploy", into / "lmdeploy", ignore=shutil.ignore_patterns("lib"))
    for file in files:
        (into / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(installed / file, into / file)
    return into


class Probes:
    """Probes that started on one tree; `result` waits for them."""

    def __init__(self, tree: Path, *names: str, **environment: str) -> None:
        path = os.pathsep.join([str(tree), str(REPOSITORY)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.lmdeploy_patches_probes", *names],
            env={**os.environ, "PYTHONPATH": path, "LMDEPLOY_ENABLE_CHECK_ENV": "0", **environment},
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> dict[str, Any]:
        """What each probe saw; a probe that raised has {"raised": name of the exception}."""
        try:
            out, err = self._process.communicate(timeout=PROBES_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = self._process.communicate()
        assert self._process.returncode == 0, err[-4000:]
        seen: dict[str, Any] = json.loads(out.splitlines()[-1])
        return seen
