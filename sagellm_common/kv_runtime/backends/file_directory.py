"""The directory of a store's disk tier: one process at a time, a subdirectory for each layout.

path/lock                       held by the process that uses it
path/<layout's fingerprint>/    layout.json, table, extent-…
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import xxhash

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import KvLayout
from sagellm_common.kv_runtime.backends.file import FileTier

log = logging.getLogger(__name__)

FORMAT = 1


class TierDirectory:
    """KV of any number of layouts under one budget: one is open, and where it needs the room the others go, the one
    unused for longest first. `setting` is the section that configures it, for errors."""

    def __init__(self, path: Path, budget_bytes: int, *, direct_io: bool = False, eviction: str = "lru",
                 setting: str = "kv_store.disk") -> None:  # fmt: skip
        """Raises ConfigError where it cannot be written, or is in use."""
        self._path = path
        self._budget_bytes = budget_bytes
        self._direct_io = direct_io
        self._eviction = eviction
        self._setting = setting
        self._open: Path | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise ConfigError(
                f"{setting}.path: {str(path)!r} cannot be written ({err.strerror}): name a directory that this user "
                "may write"
            ) from err
        self._take_lock()

    def layouts(self) -> list[KvLayout]:
        """Of the blocks as they are found (not as they are kept), the last used first."""
        return [origin for _, origin, _ in self._subdirectories()]

    def open(self, layout: KvLayout, kept: KvLayout | None = None, name: str = "nvme") -> FileTier:
        """What there is of this layout. `kept` is that of the blocks on the disk where it is another one.

        Raises ConfigError: the budget is less than a block, or the disk has not the room for its first ones.
        """
        kept = kept or layout
        described = {"format": FORMAT, "layout": asdict(layout), "kept": asdict(kept)}
        text = json.dumps(described, indent=1)
        directory = self._path / xxhash.xxh3_128_hexdigest(text.encode())
        try:
            directory.mkdir(exist_ok=True)
            # Anew each time: how old it is says when the layout was used last.
            (directory / "layout.json.new").write_text(text)
            (directory / "layout.json.new").replace(directory / "layout.json")
            self._open = directory
            return FileTier(
                directory,
                kept,
                self._budget_bytes,
                name=name,
                eviction=self._eviction,
                direct_io=self._direct_io,
                make_room=self._make_room,
                setting=self._setting,
            )
        except OSError as err:
            raise ConfigError(f"{self._setting}.path: {str(directory)!r}: {err.strerror or err}") from err

    def close(self) -> None:
        """Somebody else may use it. Idempotent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            self.close()
            raise ConfigError(
                f"{self._setting}.path: {str(self._path)!r} is in use by process {owner}: give each store a directory "
                "of its own"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _make_room(self, num_bytes: int) -> None:
        """The open layout takes this much more of the disk: all of the budget belongs to it, in the end."""
        others = [entry for entry in self._subdirectories() if entry[2] != self._open]
        assert self._open is not None
        taken = _allocated_bytes(self._open) + num_bytes
        while others and taken + sum(_allocated_bytes(path) for _, _, path in others) > self._budget_bytes:
            _, layout, path = others.pop()
            log.warning("%s: removes KV of model %s to make room", self._setting, layout.model_fingerprint)
            shutil.rmtree(path, ignore_errors=True)

    def _subdirectories(self) -> list[tuple[float, KvLayout, Path]]:
        found = []
        for path in self._path.iterdir():
            file = path / "layout.json"
            try:
                described = json.loads(file.read_text())
                if described["format"] == FORMAT:
                    found.append((file.stat().st_mtime, KvLayout(**described["layout"]), path))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nothing of ours, or of another version
        return sorted(found, key=lambda entry: entry[0], reverse=True)


def _allocated_bytes(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())
