"""What kv_store is blamed for, and what it is not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.types import KvLayout, KvSource, SamplingParams, as_token_ids
from services.prefill.jobs import PrefillJob
from services.prefill.store_fetch import FETCH_TIMEOUT_S, SLOWEST_BYTES_PER_S, StoreFetch
from tests.support.topology import LAYOUT
from tests.support.waiting import eventually

JOB = PrefillJob("r", 1, as_token_ids(range(40)), SamplingParams(max_new_tokens=1), timeout_s=10.0)
SOURCE = KvSource("t", 1, "kv_store-0", "i", "127.0.0.1:1", "127.0.0.1:2", "tcp", as_token_ids([7, 8]), 32, 30_000)


@dataclass
class Pool:
    """What fetching asks of a pool. Nothing is written to it here."""

    layout: KvLayout = LAYOUT

    def regions(self) -> KvRegion:
        return KvRegion(memoryview(b""), self.layout.block_bytes, 3)


class Surroundings:
    """Store, byte path and releaser in one. The pull ends with `error`, or hangs."""

    available = True
    encodes = False

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.pulling = False
        self.blamed: list[str] = []
        self.released: list[bool] = []
        self.stored = LAYOUT
        self.fetch = StoreFetch(self, self, self, Pool())  # type: ignore[arg-type]

    async def layout(self) -> KvLayout:
        return self.stored

    async def get(self, hashes: Any, token_ids: Any, layout: KvLayout) -> KvSource:
        assert layout == self.stored
        return SOURCE

    async def pull(self, *args: Any, timeout_s: float, **kwargs: Any) -> TransferResult:
        self.pulling = True
        if self.error is None:
            await asyncio.Event().wait()
        raise self.error or AssertionError

    def failed(self, worker_id: str) -> None:
        self.blamed.append(worker_id)

    def release(self, source: KvSource, committed: bool) -> None:
        self.released.append(committed)


def allocation() -> Allocation:
    return Allocation(as_token_ids([0, 1, 2]))


async def test_a_store_whose_pull_fails_is_left_alone_for_a_while() -> None:
    around = Surroundings(PeerLost("gone"))
    assert await around.fetch.fetch(JOB, allocation()) == 0
    assert (around.blamed, around.released) == (["kv_store-0"], [False])


async def test_a_long_prompt_is_given_the_time_its_bytes_take() -> None:
    around, timeouts = Surroundings(), []

    async def pull(*args: Any, timeout_s: float, **kwargs: Any) -> TransferResult:
        timeouts.append(timeout_s)
        return TransferResult(0, 0.0, 2)

    around.pull = pull  # type: ignore[method-assign]
    big = replace(LAYOUT, block_bytes=1 << 30)
    around.stored = big
    fetch = StoreFetch(around, around, around, Pool(big))  # type: ignore[arg-type]
    assert await fetch.fetch(JOB, allocation()) == 32
    assert timeouts == [FETCH_TIMEOUT_S + 2 * big.block_bytes / SLOWEST_BYTES_PER_S]


async def test_a_client_that_leaves_during_the_pull_is_not_the_stores_fault() -> None:
    around = Surroundings()
    fetching = asyncio.create_task(around.fetch.fetch(JOB, allocation()))
    await eventually(lambda: around.pulling)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert (around.blamed, around.released) == ([], [False])
