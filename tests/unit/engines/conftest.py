"""Fixtures of the engines' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.oracle import greedy


@pytest.fixture(scope="session")
def hf_greedy() -> Callable[[Path, list[int], int], list[int]]:
    """The oracle: Hugging Face transformers, greedy, end-of-sequence ignored."""
    return greedy
