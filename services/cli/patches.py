"""`sagellm engine patches`: which of our patches LMDeploy has. `third_party/apply_patches.sh` finds it out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from sagellm_common.core.errors import ConfigError

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


def patched_tree(overlay: Path | None = None) -> PatchedTree:
    """Looks at the overlay, else at the submodule, else at the installed package. Changes nothing.

    Raises ConfigError: there is no LMDeploy, it has another version, or a tool is missing.
    """
    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT} is missing: the patches are part of the source tree, not of the installed package")
    arguments = ["--check", *(["--overlay", str(overlay)] if overlay else [])]
    try:
        checked = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise ConfigError("bash is missing; install it to look at the patches") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{SCRIPT.name} took longer than {TIMEOUT_S} s; try it by hand") from error
    if checked.returncode not in (0, EXIT_CONFLICT):
        raise ConfigError(checked.stderr.strip().removeprefix(f"{SCRIPT.name}: "))
    (_, tree, version), *patches = (line.split("\t") for line in checked.stdout.splitlines())
    return PatchedTree(tree, version, tuple(Patch(*fields) for fields in patches))


def patches_view(found: PatchedTree) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("patch", "state", ""):
        table.add_column(column)
    for patch in found.patches:
        style = {"applied": "green", "not applied": "dim"}.get(patch.state, "red")
        table.add_row(patch.name, f"[{style}]{patch.state}[/]", escape(patch.detail))
    return Group(f"LMDeploy {found.version} in {escape(found.tree)}\n", table)
