"""etcd goes away and comes back under a running cluster: it serves from its last snapshot, then all is as before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.types import WorkerRole
from tests.support.checks import all_serving, assert_nothing_leaked, eventually
from tests.support.cluster import RunningCluster
from tests.support.etcd import etcd_cluster
from tests.support.oracle import greedy

DEADLINE_S = 60.0
OUTAGE_TIMEOUT_S = 30.0


@pytest.mark.timeout(300)  # ten processes of its own
async def test_the_cluster_outlives_etcd(tiny_llama: Path, tmp_path: Path) -> None:
    prompt = np.random.default_rng(5).integers(3, 250, size=40).tolist()
    expected = greedy(tiny_llama, prompt, 20)
    with etcd_cluster(tmp_path, size=3) as etcd:
        endpoints = ",".join(etcd.endpoints)
        settings = ("topology.backend=etcd", f"topology.endpoints={endpoints}", "topology.lease_ttl_s=1")
        with RunningCluster(*settings, model=tiny_llama) as cluster:

            async def answer() -> list[int]:
                async with asyncio.timeout(DEADLINE_S), AsyncClient(cluster.router_address) as client:
                    return list((await client.complete(prompt, max_tokens=20, ignore_eos=True)).token_ids)

            async def connected() -> bool:
                return (await asyncio.to_thread(cluster.status)).connected

            assert (await all_serving(cluster)).backend == "etcd"
            assert await answer() == expected

            await asyncio.to_thread(etcd.kill, etcd.leader())
            assert await answer() == expected
            await all_serving(cluster)

            await asyncio.to_thread(etcd.kill)
            await eventually(connected, lambda up: not up, OUTAGE_TIMEOUT_S)
            assert await answer() == expected

            await asyncio.to_thread(etcd.start)
            await eventually(connected, lambda up: up, OUTAGE_TIMEOUT_S)
            await all_serving(cluster)
            # Whoever joins now is seen: the watch is alive again, and so are the workers' leases.
            await asyncio.to_thread(cluster.add_worker, WorkerRole.DECODE)
            await all_serving(cluster)
            assert await answer() == expected
            await assert_nothing_leaked(cluster)
