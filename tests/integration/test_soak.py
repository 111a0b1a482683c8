"""A few hundred handoffs of random sizes leave nothing behind; `make soak` makes ten thousand."""

from __future__ import annotations

import psutil

from bench.soak import MAX_MORE_FDS, Curves, soak
from tests.support.checks import assert_nothing_leaked
from tests.support.cluster import RunningCluster


async def test_handoffs_leave_nothing_behind(cluster: RunningCluster) -> None:
    processes = {id: psutil.Process(cluster.pid(id)) for id in cluster.cluster.members}
    curves = await soak(cluster.router_address, processes, 300, samples=20)
    await assert_nothing_leaked(cluster)
    # Too few to judge memory, enough for a descriptor per handoff.
    grown = {name: curves.growth(name)[1] for name in processes}
    assert max(grown.values()) <= MAX_MORE_FDS, grown


def test_what_grows_is_found() -> None:
    curves = Curves(list(range(100)))
    curves.rss_mb = {"flat": [100.0] * 20 + [150.0] * 80, "leaky": [100.0 + n / 4 for n in range(100)]}
    curves.fds = {"flat": [20] * 100, "leaky": [20 + n // 10 for n in range(100)]}
    assert [complaint.partition(":")[0] for complaint in curves.complaints()] == ["leaky", "leaky"]
