"""Fixtures of the whole suite. Processes and checkpoints are made once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagellm_common.core.config_loader import load_config
from sagellm_common.engines.lmdeploy import overlay
from services.cli.models import prepare_smollm2
from tests.support.cluster import RunningCluster
from tests.support.models import tiny_model

# Before any test imports LMDeploy. SAGELLM_ENGINE__PATCHES=off runs the suite on pip's, without our patches.
overlay.use(load_config(None, os.environ).engine.patches)


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
