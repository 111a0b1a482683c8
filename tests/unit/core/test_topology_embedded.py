"""Leases of the embedded topology on a clock that moves when told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import LeaseExpired, WorkerIdTaken
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerState
from tests.support.topology import ids, make_record

TTL_S = 2.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def topology(clock: ManualClock) -> EmbeddedTopology:
    return EmbeddedTopology(clock)


async def test_an_entry_lives_exactly_its_ttl(topology: EmbeddedTopology, clock: ManualClock) -> None:
    await topology.grant(make_record(), TTL_S)
    clock.advance(TTL_S - 0.001)
    assert topology.expire() == 0
    assert ids(topology.snapshot()) == ["prefill-0"]
    clock.advance(0.001)
    assert topology.expire() == 1
    assert topology.snapshot().workers == ()


async def test_keeping_alive_starts_the_ttl_again(topology: EmbeddedTopology, clock: ManualClock) -> None:
    lease_id = await topology.grant(make_record(), TTL_S)
    for _ in range(5):
        clock.advance(0.9 * TTL_S)
        await topology.keep_alive(lease_id)
    assert ids(topology.snapshot()) == ["prefill-0"]
    assert topology.ttl_s(lease_id) == TTL_S


async def test_an_ended_lease_cannot_be_revived(topology: EmbeddedTopology, clock: ManualClock) -> None:
    lease_id = await topology.grant(make_record(), TTL_S)
    clock.advance(TTL_S)
    with pytest.raises(LeaseExpired, match=lease_id):
        await topology.keep_alive(lease_id)
    assert topology.ttl_s(lease_id) == 0


async def test_an_id_is_free_once_its_lease_has_ended(topology: EmbeddedTopology, clock: ManualClock) -> None:
    await topology.grant(make_record(incarnation="first"), TTL_S)
    with pytest.raises(WorkerIdTaken) as caught:
        await topology.grant(make_record(incarnation="second"), TTL_S)
    assert caught.value.metadata == {"worker_id": "prefill-0", "address": "127.0.0.1:1"}
    clock.advance(TTL_S)
    await topology.grant(make_record(incarnation="second"), TTL_S)
    assert [r.incarnation for r in topology.snapshot().workers] == ["second"]


async def test_the_same_incarnation_replaces_its_lease(topology: EmbeddedTopology) -> None:
    old = await topology.grant(make_record(), TTL_S)
    new = await topology.grant(make_record(), TTL_S)
    with pytest.raises(LeaseExpired):
        await topology.keep_alive(old)
    await topology.keep_alive(new)


async def test_a_lease_does_not_write_another_worker(topology: EmbeddedTopology) -> None:
    lease_id = await topology.grant(make_record(), TTL_S)
    with pytest.raises(LeaseExpired, match="another worker"):
        await topology.keep_alive(lease_id, make_record("else"))
    assert ids(topology.snapshot()) == ["prefill-0"]


async def test_revision_counts_changes_only(topology: EmbeddedTopology) -> None:
    record = make_record()
    lease_id = await topology.grant(record, TTL_S)
    await topology.keep_alive(lease_id, record)
    assert topology.snapshot().revision == 1
    await topology.keep_alive(lease_id, replace(record, state=WorkerState.DRAINING))
    assert topology.snapshot().revision == 2
    await topology.revoke(lease_id)
    await topology.revoke(lease_id)
    assert topology.snapshot().revision == 3
