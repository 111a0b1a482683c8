"""Which LMDeploy this process imports: pip's, or a patched copy of it beside the packages.

`sagellm engine patches --build` (part of `make setup`) makes the copy. Its name has the version and a hash of the
patches, so a copy made with other patches is never taken for this one. Nothing here imports LMDeploy.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Literal

from sagellm_common.core.errors import ConfigError

LMDEPLOY_VERSION = "0.11.0"
PATCHES = Path(__file__).parents[3] / "third_party" / "patches" / "lmdeploy"
MARKER = ".sagellm-overlay"
"""What apply_patches.sh leaves in a copy."""

PatchMode = Literal["auto", "off", "required"]


def check_version() -> None:
    """Raises ConfigError unless the pinned LMDeploy is installed: the engine relies on its internals."""
    try:
        found = importlib.metadata.version("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"lmdeploy is not installed; run `make setup` (lmdeploy=={LMDEPLOY_VERSION})") from None
    if found != LMDEPLOY_VERSION:
        raise ConfigError(f"lmdeploy {found} is installed, {LMDEPLOY_VERSION} is wanted; run `make setup`")


def overlay_dir() -> Path | None:
    """Where the patched copy belongs, whether it is there or not; None where the patches are not (no source tree)."""
    patches = sorted(PATCHES.glob("[0-9]*.patch"))
    if not patches:
        return None
    digest = hashlib.sha256(b"".join(patch.name.encode() + patch.read_bytes() for patch in patches)).hexdigest()
    return Path(sys.prefix) / "share" / "sagellm" / f"lmdeploy-{LMDEPLOY_VERSION}-{digest[:12]}"


def existing_overlay() -> Path | None:
    expected = overlay_dir()
    return expected if expected is not None and (expected / MARKER).is_file() else None


def use(mode: PatchMode) -> None:
    """Makes `import lmdeploy` find the patched copy, where there is one and `mode` is not `off`. Idempotent.

    Raises ConfigError: another LMDeploy is imported already, or `required` and there is no copy.
    """
    copy = existing_overlay() if mode != "off" else None
    if mode == "required" and copy is None and not _imported_is_patched():
        raise ConfigError(f"engine.patches is 'required', but {_why_none()}; run `make setup`, or use 'auto'")
    _check_imported(mode, copy)
    if copy is not None and str(copy) not in sys.path:
        sys.path.insert(0, str(copy))


def _why_none() -> str:
    expected = overlay_dir()
    return f"there is no patched LMDeploy in {expected}" if expected else f"there are no patches in {PATCHES}"


def _imported_root() -> Path | None:
    """The folder that holds the lmdeploy/ this process has imported. Raises ConfigError for one that is no package."""
    module = sys.modules.get("lmdeploy")
    if module is None:
        return None
    if not module.__file__ or getattr(module, "__version__", None) != LMDEPLOY_VERSION:
        raise ConfigError(
            f"this process has imported lmdeploy {getattr(module, '__version__', 'of unknown version')} from "
            f"{module.__file__}, {LMDEPLOY_VERSION} is wanted; start the engine in a process of its own"
        )
    return Path(module.__file__).parents[1]


def _imported_is_patched() -> bool:
    root = _imported_root()
    return root is not None and (root / "lmdeploy" / "pytorch" / "extension.py").is_file()


def _check_imported(mode: PatchMode, copy: Path | None) -> None:
    root = _imported_root()
    if root is None or root == copy:
        return
    if copy is not None or (mode == "off" and (root / MARKER).is_file()):
        raise ConfigError(
            f"engine.patches is {mode!r}, but this process has imported the LMDeploy in {root}"
            + (f" instead of the patched one in {copy}" if copy else "")
            + "; start the engine before anything else imports lmdeploy, or in a process of its own"
        )
