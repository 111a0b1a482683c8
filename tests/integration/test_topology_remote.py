"""The workers' view of a router that restarts."""

from __future__ import annotations

import pytest

from sagellm_common.core.errors import PeerLost
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.rpc.topology_client import RemoteTopology
from tests.support.topology import ids, make_record, until
from tests.support.topology_server import topology_server

TTL_S = 2.0


async def test_workers_return_to_a_restarted_router() -> None:
    async with topology_server(EmbeddedTopology()) as address:
        worker = RemoteTopology(address)
        await worker.start()
        registration = await worker.register(make_record(), TTL_S)
        await until(worker, lambda s: ids(s) == ["prefill-0"])

    away = await until(worker, lambda s: not s.connected)
    assert ids(away) == ["prefill-0"]

    # The new router's topology is empty: all it learns comes from the workers.
    reborn = EmbeddedTopology()
    async with topology_server(reborn, bind=address):
        await until(reborn, lambda s: ids(s) == ["prefill-0"])
        await until(worker, lambda s: s.connected and ids(s) == ["prefill-0"])
        assert not registration.lost.is_set()
        await registration.close()
        await until(reborn, lambda s: not s.workers)
    await worker.close()


async def test_no_router_is_said_at_the_start_and_may_come_later() -> None:
    async with topology_server(EmbeddedTopology()) as address:
        pass
    worker = RemoteTopology(address, connect_timeout_s=0.3)
    with pytest.raises(PeerLost, match=f"no router answers at {address} within"):
        await worker.start()
    with pytest.raises(PeerLost):
        await worker.register(make_record(), TTL_S)
    async with topology_server(EmbeddedTopology(), bind=address):
        worker = RemoteTopology(address)
        await worker.start()
        assert worker.snapshot().connected
        await worker.close()
