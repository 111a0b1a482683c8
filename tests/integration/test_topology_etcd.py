"""EtcdTopology and a real etcd that loses its leader, goes away, forgets and is tampered with."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sagellm_common.core import topology_etcd
from sagellm_common.core.errors import ConfigError, PeerLost, WorkerIdTaken
from sagellm_common.core.topology_etcd import EtcdTopology
from tests.support.etcd import EtcdCluster, etcd_cluster
from tests.support.topology import ids, make_record, until

TTL_S = 2.0


@asynccontextmanager
async def topology(cluster: EtcdCluster, name: str = "c") -> AsyncIterator[EtcdTopology]:
    store = EtcdTopology(cluster.endpoints, name)
    await store.start()
    try:
        yield store
    finally:
        await store.close()


def delete_key(cluster: EtcdCluster, key: str) -> None:
    cluster.post(0, "kv/deleterange", {"key": base64.b64encode(key.encode()).decode()})


def put_key(cluster: EtcdCluster, key: str, value: bytes) -> None:
    body = {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(value).decode()}
    cluster.post(0, "kv/put", body)


def compact(cluster: EtcdCluster, revision: int) -> None:
    cluster.post(0, "kv/compaction", {"revision": str(revision), "physical": True})


async def test_the_watch_alone_brings_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_etcd, "RELIST_S", 3600.0)
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            for _ in range(2):
                registration = await worker.register(make_record(), TTL_S)
                await until(router, lambda s: bool(s.workers))
                await registration.close()
                await until(router, lambda s: not s.workers)


async def test_the_list_heals_a_deaf_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EtcdTopology, "_apply", lambda self, events: None)
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            registration = await worker.register(make_record(), TTL_S)
            await until(router, lambda s: bool(s.workers))
            await registration.close()


async def test_clusters_do_not_see_each_other(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster, "blue") as blue, topology(cluster, "blue-2") as other:
            registration = await blue.register(make_record(), TTL_S)
            theirs = await other.register(make_record("theirs"), TTL_S)
            assert ids(await until(blue, lambda s: bool(s.workers))) == ["prefill-0"]
            assert ids(await until(other, lambda s: bool(s.workers))) == ["theirs"]
            await registration.close()
            await theirs.close()


async def test_registration_and_watch_survive_the_loss_of_the_leader(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path, size=3) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            registration = await worker.register(make_record(), TTL_S)
            await until(router, lambda s: bool(s.workers))

            await asyncio.to_thread(lambda: cluster.kill(cluster.leader()))
            await asyncio.to_thread(cluster.leader)

            late = await worker.register(make_record("late"), TTL_S)
            assert ids(await until(router, lambda s: s.connected and len(s.workers) == 2)) == ["late", "prefill-0"]
            # Both are kept alive by the survivors: still there when their leases would long have ended.
            with pytest.raises(AssertionError, match="not within"):
                await until(router, lambda s: len(s.workers) < 2, timeout_s=2 * TTL_S)
            assert not registration.lost.is_set()
            await registration.close()
            await late.close()
            await until(router, lambda s: not s.workers)


async def test_an_outage_keeps_the_snapshot_and_workers_return(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            record = make_record()
            registration = await worker.register(record, TTL_S)
            await until(router, lambda s: bool(s.workers))

            await asyncio.to_thread(cluster.kill)
            away = await until(router, lambda s: not s.connected)
            assert away.workers == (record,)
            with pytest.raises(PeerLost, match=r"etcd at 127\.0\.0\.1:\d+"):
                await worker.grant(make_record("new"), TTL_S)
            draining = make_record(transport="gloo")
            await registration.update(draining)

            await asyncio.to_thread(cluster.start)
            back = await until(router, lambda s: s.connected and s.workers == (draining,), timeout_s=20)
            assert back.backend == "etcd"
            assert not registration.lost.is_set()
            await registration.close()
            await until(router, lambda s: not s.workers)


async def test_workers_register_again_with_an_etcd_that_forgot_everything(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            # A history, so that the revisions of the new life are lower than those of the old one.
            for _ in range(5):
                await (await worker.register(make_record("passing"), TTL_S)).close()
            registration = await worker.register(make_record(), TTL_S)
            before = await until(router, lambda s: ids(s) == ["prefill-0"])

            def replace_etcd() -> None:
                cluster.kill()
                data = cluster.nodes[0].data_dir / "data"
                data.rename(data.with_name("old"))
                cluster.start()

            await asyncio.to_thread(replace_etcd)
            after = await until(
                router, lambda s: s.connected and ids(s) == ["prefill-0"] and s.revision < before.revision, timeout_s=20
            )
            assert after.workers == before.workers
            await registration.close()


async def test_a_watch_from_a_compacted_revision_lists_again(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            registration = await worker.register(make_record(), TTL_S)
            await until(router, lambda s: bool(s.workers))
            for i in range(5):
                put_key(cluster, "/elsewhere", str(i).encode())
            before = router.snapshot()
            # The watch that the router would resume with after an interruption.
            compact(cluster, before.revision + 5)
            etcd = router._etcd
            assert etcd is not None
            with pytest.raises(topology_etcd.EtcdError, match="compaction"):
                async with asyncio.timeout(10):
                    await router._watch(etcd, before.revision)
            await registration.close()
            await until(router, lambda s: s.connected and not s.workers)


async def test_a_key_deleted_by_hand_comes_back(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as router:
            registration = await worker.register(make_record(), TTL_S)
            first = await until(router, lambda s: bool(s.workers))
            delete_key(cluster, "/sagellm/v1/c/workers/prefill-0")
            await until(router, lambda s: bool(s.workers) and s.revision > first.revision)
            await registration.close()


async def test_a_worker_whose_id_was_taken_meanwhile_is_told(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        async with topology(cluster) as worker, topology(cluster) as rival:
            registration = await worker.register(make_record(incarnation="first"), TTL_S)
            key = "/sagellm/v1/c/workers/prefill-0"
            rival_record = topology_etcd._record_json.dump_json(make_record(incarnation="second"))
            put_key(cluster, key, rival_record)
            async with asyncio.timeout(10):
                await registration.lost.wait()
            # Leaving does not take the rival's entry along.
            await registration.close()
            assert (await until(rival, lambda s: bool(s.workers))).workers[0].incarnation == "second"


async def test_what_is_no_record_is_ignored(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        put_key(cluster, "/sagellm/v1/c/workers/listed", b"{}")
        async with topology(cluster) as worker, topology(cluster) as router:
            put_key(cluster, "/sagellm/v1/c/workers/watched", b"\xff")
            registration = await worker.register(make_record(), TTL_S)
            assert ids(await until(router, lambda s: bool(s.workers))) == ["prefill-0"]
            with pytest.raises(WorkerIdTaken, match="unknown address"):
                await worker.register(make_record("listed"), 0.1)
            await registration.close()


async def test_one_dead_endpoint_of_two_is_fine(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as cluster:
        store = EtcdTopology(["127.0.0.1:1", "no-such-host.invalid:2379", *cluster.endpoints], "c")
        await store.start()
        registration = await store.register(make_record(), TTL_S)
        await until(store, lambda s: s.connected and bool(s.workers))
        await registration.close()
        await store.close()


async def test_no_etcd_at_all_is_said_at_the_start() -> None:
    store = EtcdTopology(["127.0.0.1:1"], "c", connect_timeout_s=0.5)
    with pytest.raises(PeerLost, match=r"etcd at 127\.0\.0\.1:1 does not answer within 0\.5 s"):
        await store.start()


@pytest.mark.parametrize("endpoints", [(), ("127.0.0.1",), ("127.0.0.1:x",), (":2379",), ("h:0",), ("h:70000",)])
def test_bad_endpoints_are_refused(endpoints: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"topology\.endpoints"):
        EtcdTopology(endpoints, "c")
