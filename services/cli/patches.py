"""`sagellm engine patches`: which of our patches LMDeploy has, and the patched copy that the engine takes.

`third_party/apply_patches.sh` does the work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from sagellm_common.core.errors import ConfigError
from sagellm_common.engines.lmdeploy import overlay

SCRIPT = Path(__file__).parents[2] / "third_party" / "apply_patches.sh"
EXIT_CONFLICT = 5
"""The script's: some patch is half applied or does not apply."""
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Patch:
    name: str
    state: str
    """`applied`, `not applied`, `half applied` or `does not apply`"""
    detail: str


@dataclass(frozen=True, slots=True)
class PatchedTree:
    """An LMDeploy and what each patch is in it, in the order in which they are applied."""

    tree: str
    version: str
    patches: tuple[Patch, ...]

    @property
    def usable(self) -> bool:
        return all(patch.state in ("applied", "not applied") for patch in self.patches)


def patched_tree(copy: Path | None = None) -> PatchedTree:
    """Looks at the patched copy, else at the submodule, else at the installed package. Changes nothing.

    Raises ConfigError: there is no LMDeploy, it has another version, or a tool is missing.
    """
    checked = _run_script("--check", *(["--overlay", str(copy)] if copy else []))
    if checked.returncode not in (0, EXIT_CONFLICT):
        raise ConfigError(_words(checked))
    (_, tree, version), *patches = (line.split("\t") for line in checked.stdout.splitlines())
    return PatchedTree(tree, version, tuple(Patch(*fields) for fields in patches))


def build_overlay() -> Path:
    """Makes the copy that the engine takes, unless it is there; pip's files stay as they are. Returns where it is.

    Made under another name and moved: nobody sees half of it. Copies made with other patches are left alone, for
    another source tree may share the environment. Raises ConfigError.
    """
    target = overlay.overlay_dir()
    if target is None:
        raise ConfigError(f"there are no patches in {overlay.PATCHES}: they are part of the source tree only")
    if overlay.existing_overlay() is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
            made = Path(scratch) / target.name
            done = _run_script("--overlay", str(made))
            if done.returncode != 0:
                raise ConfigError(_words(done))
            try:
                made.rename(target)
            except OSError as error:  # somebody else may have been faster
                if overlay.existing_overlay() is None:
                    raise ConfigError(f"cannot put the patched LMDeploy into {target}: {error}; remove it") from error
    return target


def _words(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().removeprefix(f"{SCRIPT.name}: ")


def _run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT} is missing: the patches are part of the source tree, not of the installed package")
    try:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise ConfigError("bash is missing; the patches need it") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{SCRIPT.name} took longer than {TIMEOUT_S} s; try it by hand") from error


def patches_view(found: PatchedTree) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("patch", "state", ""):
        table.add_column(column)
    for patch in found.patches:
        style = {"applied": "green", "not applied": "dim"}.get(patch.state, "red")
        table.add_row(patch.name, f"[{style}]{patch.state}[/]", escape(patch.detail))
    return Group(f"LMDeploy {found.version} in {escape(found.tree)}\n", table)
