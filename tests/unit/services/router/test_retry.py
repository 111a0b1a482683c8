from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sagellm_common.core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    KvExhausted,
    NoWorker,
    PeerLost,
    TenantQuota,
)
from sagellm_common.core.types import WorkerRecord, WorkerRole
from sagellm_common.rpc.channels import ChannelPool
from services.router.retry import MAX_BACKOFF_S, Retry, blames_source
from services.router.workers import WorkerLink


@pytest.fixture
async def links() -> AsyncIterator[dict[str, WorkerLink]]:
    roles = {"p0": WorkerRole.PREFILL, "p1": WorkerRole.PREFILL, "d0": WorkerRole.DECODE, "d1": WorkerRole.DECODE}
    async with ChannelPool() as channels:
        yield {
            worker_id: WorkerLink(WorkerRecord(worker_id, role, "127.0.0.1:1", "", "i", 1), channels)
            for worker_id, role in roles.items()
        }


def test_the_last_attempt_raises_what_failed_it() -> None:
    retry = Retry(max_attempts=3)
    first = retry.delay_after(PeerLost("one"), None)
    assert 0 < first < retry.delay_after(PeerLost("two"), None)
    with pytest.raises(PeerLost, match="three"):
        retry.delay_after(PeerLost("three"), None)


@pytest.mark.parametrize("error", [InvalidRequest("x"), DeadlineExceeded("x"), NoWorker("x")], ids=repr)
def test_what_no_retry_helps_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        Retry(3).delay_after(error, None)  # type: ignore[arg-type]


def test_full_workers_are_asked_again_and_again() -> None:
    retry = Retry(max_attempts=1)
    delays = [retry.delay_after(KvExhausted("full"), None) for _ in range(100)]
    assert delays == sorted(delays) and delays[-1] == MAX_BACKOFF_S
    assert (retry.failures, retry.rejections) == (0, 100)


def test_a_tenant_at_its_limit_on_every_worker_is_told_so(links: dict[str, WorkerLink]) -> None:
    retry = Retry(max_attempts=1)
    retry.delay_after(TenantQuota("no more"), links["d0"])
    retry.delay_after(TenantQuota("no more"), links["d1"])
    with pytest.raises(TenantQuota):
        retry.delay_after(TenantQuota("no more"), links["d0"])


def test_a_workers_own_cancellation_is_no_clients() -> None:
    with pytest.raises(Draining, match="stopped"):
        Retry(max_attempts=1).delay_after(Cancelled("the engine was stopped"), None)


def test_a_failed_worker_is_avoided_while_there_is_another(links: dict[str, WorkerLink]) -> None:
    retry = Retry(9)
    retry.delay_after(EngineFailed("x"), links["d0"])
    assert [link.worker_id for link in retry.preferred(list(links.values()))] == ["p0", "p1", "d1"]
    retry.delay_after(EngineFailed("x"), links["d1"])
    retry.delay_after(EngineFailed("x"), links["p0"])
    assert [link.worker_id for link in retry.preferred(list(links.values()))] == ["p1", "d0", "d1"]


def test_a_decode_workers_loss_is_its_sources_unless_it_was_lost_itself(links: dict[str, WorkerLink]) -> None:
    decode = links["d0"]
    assert blames_source(PeerLost("connection refused"), decode)
    assert not blames_source(PeerLost("session", metadata={"worker_id": "d0"}), decode)
    assert not blames_source(EngineFailed("x"), decode)


def test_while_a_worker_is_full_its_peers_are_asked_in_turn(links: dict[str, WorkerLink]) -> None:
    retry, everybody = Retry(1), list(links.values())

    def left_after(full: str) -> list[str]:
        retry.delay_after(KvExhausted("full"), links[full])
        return [link.worker_id for link in retry.preferred(everybody)]

    assert left_after("d0") == ["p0", "p1", "d1"]
    assert left_after("d1") == ["p0", "p1", "d0", "d1"]
    assert left_after("d0") == ["p0", "p1", "d1"]
    # Nobody but a prefill worker stands in for one: the prompts of full ones would all end up on decode workers.
    only_one = [links["p0"], links["d1"]]
    retry.delay_after(KvExhausted("full"), links["p0"])
    assert retry.preferred(only_one) == only_one


def test_a_worker_that_leaves_is_no_failure_once(links: dict[str, WorkerLink]) -> None:
    retry = Retry(max_attempts=1)
    for name in ("d0", "d1"):
        retry.delay_after(Draining("leaves"), links[name])
    assert (retry.failures, retry.rejections) == (0, 2)
    assert links["p0"] in retry.preferred([*links.values()])
    with pytest.raises(Draining):
        retry.delay_after(Draining("still there"), links["d0"])
