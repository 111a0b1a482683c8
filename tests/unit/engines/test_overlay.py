"""Which LMDeploy a process imports. Nothing is imported here: the modules are empty ones of that name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.engines.lmdeploy import overlay
from sagellm_common.engines.lmdeploy.overlay import LMDEPLOY_VERSION, MARKER, PatchMode


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one patch, an environment without a copy, and a process that has imported nothing."""
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "0001-one.patch").write_text("+one\n")
    monkeypatch.setattr(overlay, "PATCHES", folder)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "lmdeploy", raising=False)
    return folder


def make_copy() -> Path:
    copy = overlay.overlay_dir()
    assert copy is not None
    copy.mkdir(parents=True)
    (copy / MARKER).touch()
    return copy


def imported(monkeypatch: pytest.MonkeyPatch, root: Path, version: str = LMDEPLOY_VERSION) -> None:
    module = ModuleType("lmdeploy")
    module.__file__, module.__dict__["__version__"] = str(root / "lmdeploy" / "__init__.py"), version
    monkeypatch.setitem(sys.modules, "lmdeploy", module)


def test_the_copys_name_changes_with_the_patches(patches: Path) -> None:
    before = overlay.overlay_dir()
    (patches / "0001-one.patch").write_text("+two\n")
    assert overlay.overlay_dir() != before
    (patches / "0001-one.patch").unlink()
    assert overlay.overlay_dir() is None


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_the_copy_goes_first_and_once(patches: Path, mode: PatchMode) -> None:
    copy = make_copy()
    overlay.use(mode)
    overlay.use(mode)
    assert sys.path[0] == str(copy)
    assert sys.path.count(str(copy)) == 1


def test_off_and_auto_without_a_copy_leave_pips(patches: Path) -> None:
    before = list(sys.path)
    overlay.use("auto")
    make_copy()
    overlay.use("off")
    assert sys.path == before


def test_required_wants_a_copy(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'required', but there is no patched LMDeploy in .*; run `make setup`"):
        overlay.use("required")
    extension = tmp_path / "patched in place" / "lmdeploy" / "pytorch" / "extension.py"
    extension.parent.mkdir(parents=True)
    extension.touch()
    imported(monkeypatch, tmp_path / "patched in place")
    overlay.use("required")


def test_another_lmdeploy_imported_before_is_refused(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(monkeypatch, tmp_path, "0.12.0")
    with pytest.raises(ConfigError, match=r"imported lmdeploy 0\.12\.0 from .*, 0\.11\.0 is wanted"):
        overlay.use("auto")
    imported(monkeypatch, tmp_path)
    overlay.use("auto")  # there is no copy it could have been
    copy = make_copy()
    with pytest.raises(ConfigError, match="'auto', but this process has imported the LMDeploy in .* instead of"):
        overlay.use("auto")
    imported(monkeypatch, copy)
    overlay.use("auto")
    with pytest.raises(ConfigError, match="'off', but this process has imported the LMDeploy in"):
        overlay.use("off")
