"""apply_patches.sh on copies of the wheel's tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.cli.patches import patched_tree
from tests.support.lmdeploy_patches import PATCHES, REPOSITORY, SCRIPT, apply_patches, installed_tree

USAGE, NOT_FOUND, WRONG_VERSION, CONFLICT, CANNOT_WRITE = 2, 3, 4, 5, 6
NAMES = [patch.stem for patch in PATCHES]


def states(*arguments: str | Path) -> list[str]:
    done = apply_patches("--check", *arguments)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["tree", *NAMES]
    return [row[1] for row in rows[1:]]


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*.py")}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_four_patches_for_the_pinned_version() -> None:
    assert [name[:4] for name in NAMES] == ["0001", "0002", "0003", "0004"]
    pinned = (REPOSITORY / "third_party/lmdeploy/VERSION").read_text().splitlines()
    assert pinned[0] == "tag v0.11.0"
    assert "readonly version=0.11.0 " in SCRIPT.read_text()


def test_apply_twice_and_reverse_twice(tree: Path) -> None:
    stock = contents(tree)
    assert states("--target", tree) == ["not applied"] * 4
    assert contents(tree) == stock, "--check wrote something"

    assert apply_patches("--target", tree).returncode == 0
    patched = contents(tree)
    assert "lmdeploy/pytorch/extension.py" in patched
    assert states("--target", tree) == ["applied"] * 4

    again = apply_patches("--target", tree)
    assert (again.returncode, again.stdout.split(":")[0]) == (0, "already applied")
    assert contents(tree) == patched

    assert apply_patches("--reverse", "--target", tree).returncode == 0
    assert contents(tree) == stock
    reversed_again = apply_patches("--reverse", "--target", tree)
    assert (reversed_again.returncode, reversed_again.stdout.split(" in ")[0]) == (0, "nothing to reverse")


def test_every_changed_file_compiles(tree: Path) -> None:
    before = contents(tree)
    apply_patches("--target", tree)
    changed = {name: source for name, source in contents(tree).items() if before.get(name) != source}
    assert len(changed) == 15
    for name, source in changed.items():
        compile(source, name, "exec")


def test_missing_patches_are_added(tree: Path) -> None:
    subprocess.run(["patch", "-s", "-p1", "-d", tree, "-i", PATCHES[0]], check=True, timeout=30)
    assert states("--target", tree) == ["applied", "not applied", "not applied", "not applied"]
    assert apply_patches("--target", tree).returncode == 0
    assert states("--target", tree) == ["applied"] * 4


def test_unrelated_changes_stay(tree: Path) -> None:
    edited = tree / "lmdeploy/pytorch/paging/scheduler.py"
    edited.write_text("# a line of somebody else\n" + edited.read_text())
    before = contents(tree)
    assert apply_patches("--target", tree).returncode == 0
    assert edited.read_text().startswith("# a line of somebody else\n")
    assert apply_patches("--reverse", "--target", tree).returncode == 0
    assert contents(tree) == before


def test_a_conflict_leaves_the_tree_as_it_was(tree: Path) -> None:
    edit(tree / "lmdeploy/pytorch/disagg/config.py", "    Mooncake = enum.auto()\n", "    Boat = enum.auto()\n")
    before = contents(tree)
    done = apply_patches("--target", tree)
    assert done.returncode == CONFLICT
    assert "conflict in lmdeploy/pytorch/disagg/config.py\n" in done.stderr
    assert contents(tree) == before
    assert states("--target", tree) == ["not applied", "not applied", "not applied", "does not apply"]
    assert apply_patches("--check", "--target", tree).returncode == CONFLICT


def test_a_missing_file_is_a_conflict(tree: Path) -> None:
    (tree / "lmdeploy/pytorch/messages.py").unlink()
    done = apply_patches("--target", tree)
    assert done.returncode == CONFLICT
    assert "conflict in lmdeploy/pytorch/messages.py\n" in done.stderr


def test_a_foreign_extension_module_is_a_conflict(tree: Path) -> None:
    foreign = tree / "lmdeploy/pytorch/extension.py"
    foreign.write_text("mine = True\n")
    assert apply_patches("--target", tree).returncode == CONFLICT
    assert foreign.read_text() == "mine = True\n"


@pytest.mark.parametrize("arguments", [(), ("--reverse",), ("--check",)])
def test_a_half_applied_patch_is_named(tree: Path, pristine: Path, arguments: tuple[str, ...]) -> None:
    apply_patches("--target", tree)
    shutil.copy(pristine / "lmdeploy/pytorch/distributed.py", tree / "lmdeploy/pytorch/distributed.py")
    before = contents(tree)
    done = apply_patches(*arguments, "--target", tree)
    assert done.returncode == CONFLICT
    assert contents(tree) == before
    lines = (done.stdout if arguments == ("--check",) else done.stderr).splitlines()
    (half,) = [line for line in lines if "\thalf applied\t" in line]
    assert half.startswith(f"{NAMES[3]}\thalf applied\t")
    assert half.endswith("changes are in")
    assert states("--target", tree) == ["applied", "applied", "applied", "half applied"]


def test_another_version_is_refused(tree: Path) -> None:
    edit(tree / "lmdeploy/version.py", "__version__ = '0.11.0'", "__version__ = '0.12.1'")
    before = contents(tree)
    done = apply_patches("--target", tree)
    assert done.returncode == WRONG_VERSION
    assert done.stderr == f"apply_patches.sh: {tree} has LMDeploy 0.12.1, the patches are for 0.11.0\n"
    assert contents(tree) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--chek"], USAGE, "unknown argument '--chek'"),
        (["--overlay"], USAGE, "--overlay wants a directory"),
        (["--check", "--reverse"], USAGE, "--check and --reverse exclude each other"),
        (["--overlay", "a", "--target", "b"], USAGE, "--overlay and --target exclude each other"),
        (["--target", "/nonexistent"], NOT_FOUND, "no lmdeploy/version.py in /nonexistent"),
        (["--check", "--overlay", "/nonexistent"], NOT_FOUND, "no overlay in /nonexistent"),
    ],
)
def test_errors_say_what_is_wrong(arguments: list[str], code: int, message: str) -> None:
    done = apply_patches(*arguments)
    assert done.returncode == code
    assert done.stderr.startswith(f"apply_patches.sh: {message}")


def test_no_lmdeploy_is_an_error(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # finds nothing
    python.chmod(0o755)
    done = apply_patches(PYTHON=str(python))
    assert done.returncode == NOT_FOUND
    assert "pip install --no-deps lmdeploy==0.11.0" in done.stderr


def test_the_installed_package_is_found_from_anywhere(tmp_path: Path) -> None:
    """Neither a folder named lmdeploy in the working directory nor an overlay on PYTHONPATH is taken for it."""
    (tmp_path / "lmdeploy").mkdir()
    (tmp_path / "lmdeploy/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        [SCRIPT, "--check"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[0] == f"tree\t{installed_tree()}/lmdeploy\t0.11.0"


def test_the_submodule_goes_before_the_package(tmp_path: Path, tree: Path, pristine: Path, python: str) -> None:
    third_party = tmp_path / "third_party"
    shutil.copytree(SCRIPT.parent / "patches", third_party / "patches")
    shutil.copy2(SCRIPT, third_party)
    shutil.copytree(pristine, third_party / "lmdeploy")
    script = third_party / SCRIPT.name
    done = subprocess.run([script], cwd="/", env={**os.environ, "PYTHON": python}, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert (third_party / "lmdeploy/lmdeploy/pytorch/extension.py").exists()
    assert contents(tree) == contents(pristine)


def test_overlay(tmp_path: Path, tree: Path, python: str) -> None:
    overlay, stock = tmp_path / "some overlay", contents(tree)
    assert apply_patches("--overlay", overlay, PYTHON=python).returncode == 0
    assert contents(tree) == stock, "the original was changed"
    assert states("--overlay", overlay) == ["applied"] * 4
    assert (overlay / "lmdeploy/lib/large.so").samefile(tree / "lmdeploy/lib/large.so")
    patched = contents(overlay)

    module = overlay / "lmdeploy/pytorch/extension.py"
    inode = module.stat().st_ino
    assert apply_patches("--overlay", overlay, PYTHON=python).stdout.startswith("already applied")
    assert module.stat().st_ino == inode

    module.unlink()  # half of it gone: it is made afresh
    assert apply_patches("--overlay", overlay, PYTHON=python).stdout.startswith("applied")
    assert contents(overlay) == patched

    assert apply_patches("--reverse", "--overlay", overlay).returncode == 0
    assert contents(overlay) == stock


def test_no_overlay_of_an_original_that_does_not_take_the_patches(tmp_path: Path, tree: Path, python: str) -> None:
    (tree / "lmdeploy/pytorch/messages.py").write_text("")
    assert apply_patches("--overlay", tmp_path / "overlay", PYTHON=python).returncode == CONFLICT
    assert not (tmp_path / "overlay").exists()


def test_an_overlay_never_replaces_a_folder_of_somebody_else(tree: Path, python: str) -> None:
    before = contents(tree)
    done = apply_patches("--overlay", tree, PYTHON=python)
    assert done.returncode == CANNOT_WRITE
    assert "is not ours" in done.stderr
    assert contents(tree) == before


def test_what_the_cli_shows(
    tmp_path: Path, python: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "overlay"
    apply_patches("--overlay", overlay, PYTHON=python)

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["sagellm", "engine", "patches", "--overlay", str(overlay), *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        return exited.value.code, capsys.readouterr().out

    code, shown = run("--json")
    assert code == 0
    assert json.loads(shown) == {
        "tree": f"{overlay}/lmdeploy",
        "version": "0.11.0",
        "patches": [{"name": name, "state": "applied", "detail": ""} for name in NAMES],
    }

    edit(overlay / "lmdeploy/pytorch/disagg/config.py", "    Custom = enum.auto()\n", "")
    code, shown = run()
    assert code == 1
    assert "half applied" in shown
    assert patched_tree().usable  # what is installed

    shutil.rmtree(overlay)
    assert run()[0] == 2
