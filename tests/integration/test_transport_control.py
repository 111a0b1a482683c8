"""Links measured between live workers, and settings changed in them: the control plane end to end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from sagellm_common.client.router import RouterClient
from sagellm_common.core.errors import InvalidRequest, KvExhausted
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole, as_token_ids
from sagellm_common.rpc import transport_control, worker_runtime
from tests.support.simulated_engine import reference
from tests.support.topology_server import topology_server
from tests.support.waiting import eventually
from tests.support.workers import Worker, decode_all, request, worker

PROMPT = list(range(1, 15))


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setattr(worker_runtime, "PUBLISH_LINKS_S", 0.02)
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@pytest.fixture
async def prefill(router: str) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL, router) as made:
        yield made


@pytest.fixture
async def decode(router: str) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, router) as made:
        yield made


@pytest.fixture
async def client(router: str, prefill: Worker, decode: Worker) -> AsyncIterator[RouterClient]:
    async with RouterClient(router) as made:
        yield made


async def handoff(prefill: Worker, decode: Worker) -> list[int]:
    """One request through both; its tokens."""
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=10)
    first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=10)
    steps = await decode_all(decode, wanted, first.token_ids, first.source)
    return [*first.token_ids, *(token for step in steps for token in step.token_ids)]


async def test_a_probe_measures_both_ways_publishes_and_leaves_nothing(
    client: RouterClient, prefill: Worker, decode: Worker
) -> None:
    probed = await client.probe_links()
    assert probed.failures == ()
    assert {(link.source_id, link.target_id) for link in probed.links} == {
        ("prefill-0", "decode-0"),
        ("decode-0", "prefill-0"),
    }
    for link in probed.links:
        assert link.backend == "tcp"
        assert link.bytes_per_s > 0 and link.latency_s >= 0 and link.per_message_s >= 0
        assert link.samples == transport_control.SMALL_REPEATS + 2 * transport_control.REPEATS
    await prefill.idle()
    await decode.idle()

    # All of the cluster hears of it: the router's planner, and whoever asks.
    view = await client.topology()
    await eventually(lambda: len(decode.topology.snapshot().links) == 2)
    view = await client.topology()
    assert {(link.source_id, link.target_id) for link in view.links} == {
        (link.source_id, link.target_id) for link in probed.links
    }
    assert await handoff(prefill, decode) == reference(PROMPT, request(PROMPT).sampling)[0]


async def test_transfers_measure_their_link_without_any_probe(prefill: Worker, decode: Worker, router: str) -> None:
    await handoff(prefill, decode)
    await eventually(lambda: decode.topology.snapshot().links)
    (link,) = decode.topology.snapshot().links
    assert (link.source_id, link.target_id, link.samples) == ("prefill-0", "decode-0", 1)


async def test_a_probe_waits_for_no_memory(client: RouterClient, prefill: Worker, decode: Worker) -> None:
    pool = prefill.engine.kv
    stats = pool.get_utilization()
    held = pool.allocate(as_token_ids(range(stats.free_blocks * 4)), stats.free_blocks * 4)
    probed = await client.probe_links(["decode-0"])
    assert probed.links == ()
    assert "prefill-0 → decode-0: KV_EXHAUSTED" in probed.failures[0]
    pool.free(held)
    assert len((await client.probe_links(["decode-0"])).links) == 1


async def test_a_source_that_is_gone_costs_only_its_own_link(client: RouterClient, decode: Worker) -> None:
    record = decode.runtime.record
    lost = replace(record, worker_id="lost", address="127.0.0.1:1")
    links, failures = await decode.runtime._transport.probe(record, [lost], 0)
    assert links == []
    assert failures[0].startswith("lost → decode-0: PEER_LOST")


async def test_what_a_probe_may_take_is_bounded(client: RouterClient, prefill: Worker) -> None:
    control, record = prefill.runtime._transport, prefill.runtime.record
    for wrong in (0, -1, transport_control.MAX_PROBE_BYTES + 1):
        with pytest.raises(InvalidRequest, match=f"num_bytes is {wrong}"):
            control.lend(record, wrong)
    with pytest.raises(InvalidRequest, match="max_bytes is -5"):
        await client_probe(control, record)
    source, block_bytes = control.lend(record, transport_control.MAX_PROBE_BYTES)
    memory = prefill.engine.kv.regions()
    assert len(source.block_table) == memory.num_blocks // transport_control.MAX_POOL_SHARE
    assert block_bytes == memory.block_bytes
    prefill.leases.release(source.transfer_id, source.epoch, committed=True)
    await prefill.idle()
    with pytest.raises(InvalidRequest, match="there is no worker nobody; known: decode-0, prefill-0"):
        await client.probe_links(["nobody"])


async def client_probe(control: transport_control.TransportControl, record: object) -> None:
    await control.probe(record, [], -5)  # type: ignore[arg-type]


async def test_a_setting_changes_one_worker_and_shows(client: RouterClient, prefill: Worker, decode: Worker) -> None:
    (changed,) = await client.set_transport({"chunk_bytes": "4096", "fusion": "off"}, ["decode-0"])
    assert changed.error == ""
    assert changed.in_force["chunk_bytes"] == "4096"
    assert changed.changes == (("chunk_bytes", "0", "4096"), ("fusion", "auto", "off"))
    await client.set_transport({"segment_min_bytes": "3"})
    channels = {w.runtime.record.worker_id: w.extras["channel"] for w in (prefill, decode)}
    now = {name: channel.settings.now for name, channel in channels.items()}  # type: ignore[attr-defined]
    assert (now["decode-0"].chunk_bytes, now["prefill-0"].chunk_bytes) == (4096, 0)
    assert {settings.segment_min_bytes for settings in now.values()} == {3}
    told = await client.set_transport({})
    assert {w.worker_id: w.changes for w in told}["prefill-0"] == (("segment_min_bytes", "262144", "3"),)
    assert await handoff(prefill, decode) == reference(PROMPT, request(PROMPT).sampling)[0]


async def test_a_wrong_setting_is_refused_by_each_and_changes_nothing(client: RouterClient, decode: Worker) -> None:
    refused = await client.set_transport({"chunk_bytes": "4096", "chunk_byte": "1"})
    assert [w.worker_id for w in refused] == ["decode-0", "prefill-0"]
    assert all("did you mean chunk_bytes?" in w.error for w in refused)
    assert decode.runtime._transport.changes() == []
    with pytest.raises(InvalidRequest, match="no worker decode-9"):
        await client.set_transport({"chunk_bytes": "1"}, ["decode-9"])


async def test_another_eviction_policy_for_one_worker_or_all(client: RouterClient, prefill: Worker) -> None:
    (changed,) = await client.set_eviction("arc", ["prefill-0"])
    assert (changed.worker_id, changed.policy, changed.error) == ("prefill-0", "arc", "")
    assert prefill.engine.kv.eviction == "arc"
    told = {worker.worker_id: worker.policy for worker in await client.set_eviction("")}
    assert told == {"prefill-0": "arc", "decode-0": "lru"}
    refused = await client.set_eviction("oldest")
    assert all("unknown eviction policy 'oldest'; known: adaptive" in worker.error for worker in refused)
    assert prefill.engine.kv.eviction == "arc"
    refused = await client.set_eviction("lru", migration="downhill")
    assert all("unknown migration policy 'downhill'; known: all, cost" in worker.error for worker in refused)
    assert prefill.engine.kv.eviction == "arc", "nothing was changed"
    told = {worker.worker_id: worker.migration for worker in await client.set_eviction("", migration="cost")}
    assert told == {"prefill-0": "", "decode-0": ""}, "they have no lower tiers"
    with pytest.raises(InvalidRequest, match="no worker decode-9"):
        await client.set_eviction("lru", ["decode-9"])


async def test_a_store_without_memory_lends_none(prefill: Worker) -> None:
    """As kv_store before its first block."""

    class Empty:
        num_blocks, block_bytes = 0, 0

    control = prefill.runtime._transport
    control._pool = type("Pool", (), {"regions": lambda self: Empty()})()  # type: ignore[assignment]
    with pytest.raises(KvExhausted, match="has no KV memory yet"):
        control.lend(prefill.runtime.record, 1)
