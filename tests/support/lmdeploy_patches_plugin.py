"""Plug-ins of the patched LMDeploy, found through the environment and through an entry point."""

from __future__ import annotations

from typing import Any


def from_environment(hooks: Any) -> None:
    hooks.found_through_environment = True


def from_entry_point(hooks: Any) -> None:
    hooks.found_through_entry_point = True
