"""Prompts of 32K tokens and more through a cluster of real processes, against an unpaged forward pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.client.aio import Completion
from sagellm_common.client.sync import Client
from tests.support.cluster import RunningCluster
from tests.support.models import tiny_long_context_model
from tests.support.oracle import greedy

LONGEST = 128 << 10
NEW_TOKENS = 12
GROWTH_LIMIT_MIB = 100
"""One mask of all queries of a chunk times all keys would be 300 MiB at 32K tokens."""
LEASE_S = 1.0
"""Shorter than the prefill of 32K tokens."""

minutes = pytest.mark.skipif(
    not os.environ.get("SAGELLM_TEST_LONG"), reason="takes minutes; `make test-long` sets SAGELLM_TEST_LONG=1"
)


@pytest.fixture(scope="module")
def long_cluster() -> Iterator[RunningCluster]:
    settings = (
        f"engine.num_blocks={LONGEST // 16 + 64}",
        "engine.max_prefill_tokens=2048",
        f"transport.lease_ttl_s={LEASE_S}",
        "router.request_timeout_s=3600",
    )
    with RunningCluster(*settings, model=tiny_long_context_model()) as running:
        yield running


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(0).integers(3, 259, size=LONGEST).tolist()  # type: ignore[no-any-return]


def complete(cluster: RunningCluster, prompt: list[int], salt: str) -> Completion:
    """A salt of its own keeps a request from what the caches hold of others."""
    with Client(cluster.router_address, timeout_s=3600) as client:
        return client.complete(prompt, max_tokens=NEW_TOKENS, ignore_eos=True, cache_salt=salt)


def peak_mib(cluster: RunningCluster, process_id: str) -> float:
    status = Path(f"/proc/{cluster.pid(process_id)}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize(
    "num_tokens", [32 << 10, *(pytest.param(n << 10, marks=[minutes, pytest.mark.timeout(3600)]) for n in (64, 128))]
)
def test_tokens_are_right_and_memory_does_not_grow_with_the_prompt(
    long_cluster: RunningCluster, prompt: list[int], num_tokens: int
) -> None:
    before = {name: peak_mib(long_cluster, name) for name in ("prefill-0", "decode-0")}
    completion = complete(long_cluster, prompt[:num_tokens], f"{num_tokens}")
    assert list(completion.token_ids) == greedy(tiny_long_context_model(), prompt[:num_tokens], NEW_TOKENS)
    assert completion.summary.kv_bytes_transferred == num_tokens * 256  # 2 layers, keys and values, 16 float32 each
    for name, peak in before.items():
        assert peak_mib(long_cluster, name) - peak < GROWTH_LIMIT_MIB, name


def test_the_far_end_of_a_long_prompt_counts(long_cluster: RunningCluster, prompt: list[int]) -> None:
    """The same last 12K tokens after other first ones: what was pulled from there is really read."""
    other = [*reversed(prompt[: 4 << 10]), *prompt[4 << 10 : 16 << 10]]
    first, second = (complete(long_cluster, tokens, "far end") for tokens in (prompt[: 16 << 10], other))
    assert first.token_ids != second.token_ids
