"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sagellm_common.engines.lmdeploy import hooks
from tests.support.oracle import greedy


@pytest.fixture(scope="session")
def hf_greedy() -> Callable[[Path, list[int], int], list[int]]:
    """The oracle: Hugging Face transformers, greedy, end-of-sequence ignored."""
    return greedy


@pytest.fixture
def hooked() -> None:
    """Skips where LMDeploy is not patched."""
    if missing := hooks.missing():
        pytest.skip(f"LMDeploy lacks the hooks {', '.join(missing)}; `make setup` patches a copy (it needs `patch`)")


@pytest.fixture
def stock_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDeploy's scheduler as it is without our patches, though this process may have imported a patched one."""
    if hooks.available():
        from lmdeploy.pytorch.extension import EXT

        for name in hooks.HOOKS:
            monkeypatch.setattr(EXT, name, None)
        monkeypatch.setattr(hooks, "available", frozenset)
