"""kill -9 of either side while blocks are copied out of the other's memory: nothing hangs, leaks or comes out wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Arm
from tests.faults.test_kills import NEW_TOKENS, complete, fresh_prompt
from tests.support.checks import all_serving, assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.oracle import greedy


@pytest.fixture(scope="module")
def shm_cluster(failpoints: Path) -> Iterator[RunningCluster]:
    settings = ("transport.backend=shm", "transport.lease_ttl_s=2", "transport.timeout_s=2", "topology.lease_ttl_s=1")
    overlap = ("transport.overlap_min_bytes=80000", "engine.max_prefill_tokens=64", "engine.num_blocks=256")
    with RunningCluster(*settings, *overlap, restart=True) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("stage", "num_tokens"),
    [("source.sending", 70), ("source.sending", 400), ("receiver.pulling", 400)],
    ids=["source-computed", "source-being-computed", "receiver"],
)
async def test_a_kill_while_blocks_are_copied(
    shm_cluster: RunningCluster, arm: Arm, tiny_llama: Path, stage: str, num_tokens: int
) -> None:
    await all_serving(shm_cluster)
    prompt = fresh_prompt(num_tokens)
    arm(stage)
    done = await complete(shm_cluster, prompt)
    assert list(done.token_ids) == greedy(tiny_llama, prompt, NEW_TOKENS)
    assert done.summary.attempts > 1
    await all_serving(shm_cluster)
    await assert_nothing_leaked(shm_cluster)
