from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.lmdeploy_patches import copy_of_stock, touched_files

NOT_TOUCHED = ("lmdeploy/__init__.py", "lmdeploy/version.py")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those files of the installed LMDeploy that matter to the patches, and a library. Read only: copy it."""
    copied = copy_of_stock(tmp_path_factory.mktemp("pristine"), [*touched_files(), *NOT_TOUCHED])
    (copied / "lmdeploy/lib").mkdir()
    (copied / "lmdeploy/lib/large.so").write_bytes(b"\x7fELF")
    return copied


@pytest.fixture
def tree(pristine: Path, tmp_path: Path) -> Path:
    """A stock tree of the test's own."""
    shutil.copytree(pristine, tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def python(tree: Path, tmp_path: Path) -> str:
    """Stands for an interpreter in which `tree` is installed."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {tree}\n")
    python.chmod(0o755)
    return str(python)
