"""What every TopologyStore does: embedded, the embedded one over gRPC, etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from sagellm_common.core.errors import WorkerIdTaken
from sagellm_common.core.topology import LinkCost, Registration, TopologyStore
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.topology_etcd import EtcdTopology
from sagellm_common.core.types import WorkerRole, WorkerState
from sagellm_common.rpc.topology_client import RemoteTopology
from tests.support.etcd import EtcdCluster, etcd_cluster
from tests.support.topology import ids, make_record, until
from tests.support.topology_server import topology_server

TTL_S = 2.0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(params=["embedded", "remote", "etcd"])
async def make_store(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], TopologyStore]]:
    """Makes clients of one and the same topology."""
    async with AsyncExitStack() as stack:
        if request.param == "embedded":
            embedded = EmbeddedTopology()
            yield lambda: embedded
        elif request.param == "remote":
            address = await stack.enter_async_context(topology_server(EmbeddedTopology()))
            yield lambda: RemoteTopology(address)
        else:
            cluster: EtcdCluster = request.getfixturevalue("etcd")
            # Its own cluster name: what an earlier test left behind under a lease is none of this test's.
            name = request.node.name
            yield lambda: EtcdTopology(cluster.endpoints, name)


@pytest.fixture
async def store(make_store: Callable[[], TopologyStore]) -> AsyncIterator[TopologyStore]:
    store = make_store()
    await store.start()
    yield store
    await store.close()


@pytest.fixture
async def other(make_store: Callable[[], TopologyStore]) -> AsyncIterator[TopologyStore]:
    """A second client, as another process would have."""
    store = make_store()
    await store.start()
    yield store
    await store.close()


def silence(registration: Registration) -> None:
    """The process is gone: it renews nothing and says nothing."""
    registration._task.cancel()  # type: ignore[attr-defined]


async def test_starts_connected_and_empty(store: TopologyStore) -> None:
    assert store.snapshot().connected
    assert store.snapshot().workers == ()


async def test_a_worker_joins_with_all_it_said_and_leaves(store: TopologyStore, other: TopologyStore) -> None:
    record = make_record()
    registration = await store.register(record, TTL_S)
    # The follower is another client and must notice within a second (the bound, not a timing).
    snapshot = await until(other, lambda s: bool(s.workers), timeout_s=1.0)
    assert snapshot.workers == (record,)
    await registration.close()
    await until(other, lambda s: not s.workers, timeout_s=1.0)
    await registration.close()


async def test_workers_are_sorted_by_id(store: TopologyStore) -> None:
    registrations = [await store.register(make_record(name), TTL_S) for name in ("c", "a", "b")]
    assert ids(await until(store, lambda s: len(s.workers) == 3)) == ["a", "b", "c"]
    for registration in registrations:
        await registration.close()


async def test_an_update_reaches_the_followers(store: TopologyStore, other: TopologyStore) -> None:
    record = make_record()
    registration = await store.register(record, TTL_S)
    first = await until(other, lambda s: bool(s.workers))
    changed = replace(record, state=WorkerState.DRAINING, role=WorkerRole.BOTH)
    await registration.update(changed)
    second = await until(other, lambda s: s.workers == (changed,))
    assert second.revision > first.revision
    await registration.close()


async def test_an_entry_outlives_its_ttl_while_it_is_kept_alive(store: TopologyStore, other: TopologyStore) -> None:
    registration = await store.register(make_record(), TTL_S)
    await until(other, lambda s: bool(s.workers))
    with pytest.raises(AssertionError, match="not within"):
        await until(other, lambda s: not s.workers, timeout_s=1.75 * TTL_S)
    assert not registration.lost.is_set()
    await registration.close()


async def test_a_silent_worker_is_gone_after_its_lease(store: TopologyStore, other: TopologyStore) -> None:
    silence(await store.register(make_record(), TTL_S))
    await until(other, lambda s: bool(s.workers))
    await until(other, lambda s: not s.workers, timeout_s=4 * TTL_S)


async def test_a_taken_id_is_refused_and_the_holder_stays(store: TopologyStore, other: TopologyStore) -> None:
    registration = await store.register(make_record(incarnation="first"), TTL_S)
    with pytest.raises(WorkerIdTaken, match=r"'prefill-0' is held by another process at 127\.0\.0\.1:1"):
        await other.register(make_record(incarnation="second"), 0.25)
    assert [r.incarnation for r in store.snapshot().workers] == ["first"]
    assert not registration.lost.is_set()
    await registration.close()


async def test_a_restarted_worker_waits_out_its_earlier_self(store: TopologyStore, other: TopologyStore) -> None:
    silence(await store.register(make_record(incarnation="first"), TTL_S))
    registration = await other.register(make_record(incarnation="second"), TTL_S)
    snapshot = await until(store, lambda s: bool(s.workers) and s.workers[0].incarnation == "second")
    assert len(snapshot.workers) == 1
    await registration.close()


async def test_the_same_incarnation_may_register_again(store: TopologyStore) -> None:
    silence(await store.register(make_record(), TTL_S))
    registration = await store.register(make_record(address="127.0.0.1:9"), TTL_S)
    await until(store, lambda s: [r.address for r in s.workers] == ["127.0.0.1:9"])
    await registration.close()


async def test_one_of_many_rivals_wins(store: TopologyStore) -> None:
    rivals = [store.register(make_record(incarnation=f"i{i}"), 0.25) for i in range(5)]
    results = await asyncio.gather(*rivals, return_exceptions=True)
    winners = [r for r in results if not isinstance(r, BaseException)]
    assert len(winners) == 1
    assert all(isinstance(r, WorkerIdTaken) for r in results if isinstance(r, BaseException))
    await winners[0].close()


async def test_changes_end_when_the_store_is_closed(make_store: Callable[[], TopologyStore]) -> None:
    store = make_store()
    await store.start()
    async with asyncio.timeout(10):
        seen = []
        async for snapshot in store.changes():
            seen.append(snapshot)
            await store.close()
    assert [snapshot.connected for snapshot in seen] == [True]
    await store.close()


# ---- costs of links ----


def link(source_id: str, target_id: str = "prefill-0", bytes_per_s: float = 2e9) -> LinkCost:
    return LinkCost(source_id, target_id, "tcp", 0.0005, bytes_per_s, 0.000025, 1e9, 7)


async def test_links_are_published_replaced_and_gone_with_their_target(
    store: TopologyStore, other: TopologyStore
) -> None:
    target, source = await store.register(make_record(), TTL_S), await store.register(make_record("decode-0"), TTL_S)
    await target.publish_links([link("decode-0"), link("store-0")])
    await source.publish_links([link("prefill-0", "decode-0")])
    snapshot = await until(other, lambda s: len(s.links) == 3)
    assert {(found.source_id, found.target_id) for found in snapshot.links} == {
        ("decode-0", "prefill-0"),
        ("store-0", "prefill-0"),
        ("prefill-0", "decode-0"),
    }
    found = next(found for found in snapshot.links if found.source_id == "decode-0")
    assert (found.backend, found.bytes_per_s, found.measured_at_s, found.samples) == ("tcp", 2e9, 1e9, 7)
    assert (found.latency_s, found.per_message_s) == (pytest.approx(0.0005), pytest.approx(0.000025))

    await target.publish_links([link("decode-0", bytes_per_s=5e9)])
    await until(other, lambda s: 5e9 in {found.bytes_per_s for found in s.links} and len(s.links) == 3)
    await target.close()
    snapshot = await until(other, lambda s: len(s.workers) == 1)
    assert [found.target_id for found in snapshot.links] == ["decode-0"]
    await source.close()


async def test_links_come_back_with_a_lease_that_was_lost(store: TopologyStore, other: TopologyStore) -> None:
    registration = await store.register(make_record(), TTL_S)
    await registration.publish_links([link("decode-0")])
    await until(other, lambda s: len(s.links) == 1)
    await store.revoke(registration._lease_id)  # type: ignore[attr-defined]
    await until(other, lambda s: not s.workers and not s.links)
    await until(other, lambda s: len(s.workers) == len(s.links) == 1)
    await registration.close()
