"""What must hold of a cluster once nothing runs any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sagellm_common.client.router import ClusterView
from sagellm_common.core.errors import SageError
from tests.support.cluster import RunningCluster

T = TypeVar("T")

SETTLE_TIMEOUT_S = 30.0
RESTART_TIMEOUT_S = 90.0
POLL_S = 0.05


async def eventually(ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool], timeout_s: float) -> T:
    """Asks until the answer holds. Fails with the last answer at the deadline."""
    last: object = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    answer = await ask()
                    if holds(answer):
                        return answer
                    last = answer
                except (SageError, OSError) as err:
                    last = err
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s; last: {last}") from None


async def assert_nothing_leaked(cluster: RunningCluster) -> None:
    """On every worker free + used + cached == total at any time, and within the leases' time nothing is held."""

    async def view() -> ClusterView:
        return await asyncio.to_thread(cluster.status)

    def idle(found: ClusterView) -> bool:
        for worker in found.workers:
            assert worker.kv is None or worker.kv.balanced, f"{worker.record.worker_id}: {worker.kv}"
        return all(
            worker.kv is not None
            and worker.kv.used_blocks
            == worker.running_requests
            == worker.waiting_requests
            == worker.reservations
            == worker.pinned_transfers
            == 0
            for worker in found.workers
        )

    await eventually(view, idle, SETTLE_TIMEOUT_S)


async def all_serving(cluster: RunningCluster) -> ClusterView:
    """Waits until every worker that was started is in the topology and alive, restarted ones included."""
    expected = {member.id for member in cluster.cluster.workers}

    async def view() -> ClusterView:
        return await asyncio.to_thread(cluster.status)

    def complete(found: ClusterView) -> bool:
        pids = {w.record.worker_id: w.record.pid for w in found.workers if w.kv is not None}
        return all(cluster.alive(id) and pids.get(id) == cluster.pid(id) for id in expected)

    return await eventually(view, complete, RESTART_TIMEOUT_S)
