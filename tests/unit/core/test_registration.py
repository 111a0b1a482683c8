"""The keepalive loop against a store whose every answer is scripted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from sagellm_common.core.errors import LeaseExpired, PeerLost, SageError, WorkerIdTaken
from sagellm_common.core.registration import open_registration
from sagellm_common.core.types import WorkerRecord, WorkerState
from tests.support.topology import make_record

TTL_S = 0.03


@dataclass
class ScriptedStore:
    """Raises the errors it is given, one a call, then works."""

    grant_errors: list[SageError] = field(default_factory=list)
    renew_errors: list[SageError] = field(default_factory=list)
    revoke_errors: list[SageError] = field(default_factory=list)
    entry: WorkerRecord | None = None
    grants: int = 0
    renewed: asyncio.Event = field(default_factory=asyncio.Event)
    revoked: list[str] = field(default_factory=list)

    async def grant(self, record: WorkerRecord, ttl_s: float) -> str:
        if self.grant_errors:
            raise self.grant_errors.pop(0)
        self.entry, self.grants = record, self.grants + 1
        return f"lease-{self.grants}"

    async def keep_alive(self, lease_id: str, record: WorkerRecord) -> None:
        if self.renew_errors:
            raise self.renew_errors.pop(0)
        assert lease_id == f"lease-{self.grants}"
        self.entry = record
        self.renewed.set()

    async def revoke(self, lease_id: str) -> None:
        if self.revoke_errors:
            raise self.revoke_errors.pop(0)
        self.revoked.append(lease_id)
        self.entry = None


async def wait(event: asyncio.Event) -> None:
    async with asyncio.timeout(10):
        await event.wait()


async def test_it_renews_by_itself_and_leaves_once() -> None:
    store = ScriptedStore()
    registration = await open_registration(store, make_record(), TTL_S)
    await wait(store.renewed)
    await registration.close()
    await registration.close()
    assert store.revoked == ["lease-1"]


async def test_an_ended_lease_is_replaced() -> None:
    store = ScriptedStore(renew_errors=[LeaseExpired("gone")])
    registration = await open_registration(store, make_record(), TTL_S)
    await wait(store.renewed)
    assert store.grants == 2
    assert not registration.lost.is_set()
    await registration.close()
    assert store.revoked == ["lease-2"]


async def test_it_outlasts_an_outage() -> None:
    store = ScriptedStore(renew_errors=[PeerLost("away"), PeerLost("away"), LeaseExpired("gone")])
    store.grant_errors = []
    registration = await open_registration(store, make_record(), TTL_S)
    store.grant_errors = [PeerLost("away again")]
    await wait(store.renewed)
    assert store.renew_errors == store.grant_errors == []
    await registration.close()


async def test_an_update_made_during_an_outage_arrives_after_it() -> None:
    store = ScriptedStore()
    registration = await open_registration(store, make_record(), 60.0)
    store.renew_errors = [PeerLost("away")]
    draining = replace(make_record(), state=WorkerState.DRAINING)
    await registration.update(draining)
    assert store.entry == make_record()
    await registration.update(draining)
    assert store.entry == draining
    await registration.close()


@pytest.mark.parametrize(
    ("renew", "grant"), [([WorkerIdTaken("other")], []), ([LeaseExpired("gone")], [WorkerIdTaken("other")])]
)
async def test_an_id_taken_meanwhile_is_lost_for_good(renew: list[SageError], grant: list[SageError]) -> None:
    store = ScriptedStore()
    registration = await open_registration(store, make_record(), TTL_S)
    store.renew_errors, store.grant_errors = list(renew), list(grant)
    await wait(registration.lost)
    store.renewed.clear()
    await registration.update(make_record(transport="gloo"))
    assert not store.renewed.is_set()
    await registration.close()
    assert store.revoked == []


async def test_leaving_a_store_that_is_away_is_no_error() -> None:
    store = ScriptedStore(revoke_errors=[PeerLost("away")])
    registration = await open_registration(store, make_record(), TTL_S)
    await registration.close()
    assert store.revoked == []


async def test_a_taken_id_is_tried_for_twice_the_ttl() -> None:
    store = ScriptedStore(grant_errors=[WorkerIdTaken("first")])
    registration = await open_registration(store, make_record(), 60.0)
    await registration.close()

    store = ScriptedStore(grant_errors=[WorkerIdTaken("still") for _ in range(1000)])
    with pytest.raises(WorkerIdTaken):
        await open_registration(store, make_record(), TTL_S)


async def test_a_store_that_stays_away_is_told() -> None:
    store = ScriptedStore(grant_errors=[PeerLost("away"), PeerLost("away")])
    with pytest.raises(PeerLost):
        await open_registration(store, make_record(), TTL_S, connect_timeout_s=0)
    registration = await open_registration(store, make_record(), TTL_S)
    await registration.close()
