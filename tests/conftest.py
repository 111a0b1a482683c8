"""Fixtures of the whole suite. Processes and checkpoints are made once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from sagellm_common.core.config_loader import load_config
from sagellm_common.engines.lmdeploy import overlay
from services.cli.models import prepare_smollm2
from tests.support.cluster import RunningCluster
from tests.support.models import tiny_model

# torch's TCPStore asks DNS for the name of 127.0.0.1 at each connection (it looks it up as ::ffff:127.0.0.1, which no
# /etc/hosts has). Where DNS does not answer, or limits how often it does, that takes 10 s: longer than our deadlines.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# Before any test imports LMDeploy. SAGELLM_ENGINE__PATCHES=off runs the suite on pip's, without our patches.
overlay.use(load_config(None, os.environ).engine.patches)
# Nothing is timed in a test: a busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

HEAVY_FIRST = ("faults", "integration", "contract", "property", "unit")
"""Folders in the order in which workers take them: what takes longest begins first, and the rest fills the gaps."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Says what runs in one of the workers of pytest-xdist (`make test` has several): what shares a cluster, else a
    module."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = item.nodeid.partition("::")[0]
        for name in ("cluster", "faulty_cluster"):
            # A module's own fixture of the name is nobody else's.
            if name in getattr(item, "fixturenames", ()) and not hasattr(getattr(item, "module", None), name):
                group = name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: _rank(item.path.relative_to(config.rootpath / "tests").parts[0]))


def _rank(folder: str) -> int:
    return HEAVY_FIRST.index(folder) if folder in HEAVY_FIRST else len(HEAVY_FIRST)


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A random two-layer Llama with a token per byte."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_qwen2() -> Path:
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct."""
    return prepare_smollm2()


@pytest.fixture(scope="session")
def cluster() -> Iterator[RunningCluster]:
    """1 prefill, 1 decode and a store with the tiny Llama. Shared: kill nothing in it.

    80 kB are 160 tokens: KV of longer prompts is pulled while their chunks are computed, of others afterwards.
    """
    with RunningCluster("transport.overlap_min_bytes=80000", "engine.max_prefill_tokens=64") as running:
        yield running
