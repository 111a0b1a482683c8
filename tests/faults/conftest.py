"""One 2P2D cluster with three stores, which keep each block twice, for all kills; dead processes are started again."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.checks import all_serving, assert_nothing_leaked
from tests.support.cluster import RunningCluster


class Arm(Protocol):
    def __call__(self, name: str, number: signal.Signals = signal.SIGKILL) -> None: ...


@pytest.fixture(scope="package")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("failpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGELLM_FAILPOINTS", str(directory))
        yield directory


@pytest.fixture(scope="package")
def faulty_cluster(failpoints: Path) -> Iterator[RunningCluster]:
    settings = ("transport.lease_ttl_s=2", "transport.timeout_s=2", "topology.lease_ttl_s=1", "engine.num_blocks=256")
    # 80 kB are 160 tokens of the tiny Llama: longer prompts are pulled while their chunks are computed, others after.
    overlap = ("transport.overlap_min_bytes=80000", "engine.max_prefill_tokens=64")
    stores = ("kv_store.stores=3", "kv_store.replicas=2")
    with RunningCluster(*settings, *overlap, *stores, num_prefill=2, num_decode=2, restart=True) as cluster:
        yield cluster


@pytest.fixture
async def healthy(faulty_cluster: RunningCluster) -> AsyncIterator[RunningCluster]:
    """The cluster, whole and idle before the test and after it."""
    await all_serving(faulty_cluster)
    await assert_nothing_leaked(faulty_cluster)
    yield faulty_cluster
    await all_serving(faulty_cluster)
    await assert_nothing_leaked(faulty_cluster)


@pytest.fixture
def arm(failpoints: Path) -> Iterator[Arm]:
    """Arms a failpoint: the first process that passes it gets the signal. The test fails if none did."""
    armed: list[Path] = []

    def arm(name: str, number: signal.Signals = signal.SIGKILL) -> None:
        armed.append(failpoints / name)
        # At once, or a process might read half of it.
        scratch = failpoints / f".{name}"
        scratch.write_text(number.name)
        scratch.rename(armed[-1])

    yield arm
    left = [path.name for path in armed if path.exists()]
    for path in armed:
        path.unlink(missing_ok=True)
    assert not left, f"nothing passed the failpoints {left}"
