"""Workers come, go, change their roles and are replaced under load: nobody's request fails, nobody's tokens change.

Real processes; the oracle is transformers on the same weights.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.client.aio import AsyncClient, Completion
from sagellm_common.core.errors import InvalidRequest, WrongRole
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind
from tests.support.checks import assert_nothing_leaked, eventually
from tests.support.cluster import RunningCluster
from tests.support.oracle import continued, greedy

NEW_TOKENS = 150
MANY_TOKENS = 1200
"""Enough to be still under way when a worker has left."""
DEADLINE_S = 100.0
SETTLE_S = 30.0
SETTINGS = (
    "engine.num_blocks=256",
    "topology.lease_ttl_s=1",
    "cluster.drain_grace_s=30",
    "kv_store.enabled=false",
)
LONG = os.environ.get("SAGELLM_TEST_LONG") == "1"
"""Every worker is replaced, and one is added."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with RunningCluster(*SETTINGS, num_prefill=1, num_decode=2) as running:
        yield running


class Load:
    """Two greedy requests and a sampled one in flight at any time. No cache spares any of them its way."""

    SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {}, {"temperature": 0.8, "seed": 11})

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.prompts = [np.random.default_rng(n).integers(3, 250, size=40 + n).tolist() for n in range(3)]
        self.done: list[list[Completion]] = [[], [], []]
        self.stopping = False
        self._salts = itertools.count()

    async def repeat(self, which: int) -> None:
        while not self.stopping:
            answer = await self.client.complete(
                self.prompts[which],
                max_tokens=NEW_TOKENS,
                ignore_eos=True,
                timeout_s=DEADLINE_S,
                cache_salt=str(next(self._salts)),
                **self.SAMPLINGS[which],
            )
            self.done[which].append(answer)

    async def more(self) -> None:
        """Returns when each was answered once more, or was about to be."""
        targets = [len(answers) + 1 for answers in self.done]
        async with asyncio.timeout(DEADLINE_S):
            while any(len(answers) < n for answers, n in zip(self.done, targets, strict=True)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def under_load(cluster: RunningCluster, model: Path) -> AsyncIterator[Load]:
    """For the time of the block. Afterwards: all were answered, with the oracle's tokens, and nothing is held."""
    async with AsyncClient(cluster.router_address) as client:
        load = Load(client)
        async with asyncio.TaskGroup() as group:
            for which in range(3):
                group.create_task(load.repeat(which))
            await load.more()
            yield load
            await load.more()
            load.stopping = True
    *answers, sampled = [{answer.token_ids for answer in answers} for answers in load.done]
    assert answers == [{tuple(greedy(model, prompt, NEW_TOKENS))} for prompt in load.prompts[:2]]
    assert len(sampled) == 1, "the first one was undisturbed, the others say the same"
    assert {answer.summary.attempts for answers in load.done for answer in answers} == {1}, "no plan is a failure"
    await assert_nothing_leaked(cluster)


def sagellm(cluster: RunningCluster, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *argv, "--router", cluster.router_address]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


async def leaves_in_the_middle(
    cluster: RunningCluster, load: Load, leave: Callable[[str], Awaitable[object]]
) -> tuple[str, list[int]]:
    """Has the decode worker of a long generation leave; its id, and the tokens, which came from two workers."""
    found, worker_id, request_id = list[int](), "", uuid.uuid4().hex
    leaving: asyncio.Future[object] | None = None
    outputs = load.client.generate(
        load.prompts[0], max_tokens=MANY_TOKENS, ignore_eos=True, request_id=request_id, cache_salt=request_id
    )
    async with aclosing(outputs):
        async for output in outputs:
            found += output.token_ids
            if len(found) > 5 and leaving is None:
                plan = (await load.client.explain(request_id)).plan
                worker_id = next(node.worker_id for node in plan.nodes if node.kind is PlanNodeKind.DECODE)
                leaving = asyncio.ensure_future(leave(worker_id))
    assert leaving is not None and output.summary is not None
    await leaving
    assert output.summary.decode_worker_id != worker_id
    stages = [event.stage for event in (await load.client.explain(request_id)).events]
    assert stages.count("hand over") == 1, "moved with its KV: not lost and computed anew"
    return worker_id, found


async def test_workers_change_leave_and_are_replaced_under_load(cluster: RunningCluster, tiny_llama: Path) -> None:
    async with under_load(cluster, tiny_llama) as load:

        async def becomes_prefill(worker_id: str) -> None:
            changed = await load.client.set_role(worker_id, WorkerRole.PREFILL)
            assert (changed.before, changed.unfinished_requests) == (WorkerRole.DECODE, 0)

        changed, found = await leaves_in_the_middle(cluster, load, becomes_prefill)
        assert found == continued(tiny_llama, load.prompts[0], found)
        said = await asyncio.to_thread(sagellm, cluster, "worker", "set-role", "prefill-0", "both", "--json")
        assert json.loads(said.stdout) == {
            "worker_id": "prefill-0",
            "role": "both",
            "before": "prefill",
            "unfinished_requests": 0,
        }
        await load.more()
        await load.client.set_role("prefill-0", WorkerRole.PREFILL)
        await load.client.set_role(changed, WorkerRole.DECODE)

        for worker_id in ("prefill-0", "decode-1") if LONG else ():
            await asyncio.to_thread(cluster.restart, worker_id)
            await load.more()
        await asyncio.to_thread(cluster.restart, "decode-0")
        await load.more()
        if LONG:
            assert await asyncio.to_thread(cluster.add_worker, WorkerRole.BOTH) == "both-0"
            await load.more()

        async def drains(worker_id: str) -> None:
            assert await load.client.drain_worker(worker_id, grace_s=30) == 0

        gone, same = await leaves_in_the_middle(cluster, load, drains)
        assert same == found
        said = await asyncio.to_thread(sagellm, cluster, "worker", "drain", "prefill-0", "--grace-s", "30")
        assert (said.returncode, said.stderr) == (0, "prefill-0 is drained, 0 requests unfinished\n")
        for worker_id in (gone, "prefill-0"):
            await eventually(partial(asyncio.sleep, 0, worker_id), lambda id: not cluster.alive(id), SETTLE_S)
        await load.more()
    left = {w.record.worker_id for w in (await asyncio.to_thread(cluster.status)).workers}
    assert left.isdisjoint({gone, "prefill-0"})


async def test_what_cannot_be_is_refused(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router_address) as client:
        with pytest.raises(InvalidRequest, match="there is no worker decode-9; known: "):
            await client.set_role("decode-9", WorkerRole.BOTH)
        (worker_id, *_) = [w.record.worker_id for w in (await client.topology()).workers]
        with pytest.raises(WrongRole, match=f"{worker_id} cannot take the role kv_store"):
            await client.set_role(worker_id, WorkerRole.KV_STORE)
        with pytest.raises(InvalidRequest, match="worker_id is empty"):
            await client.drain_worker("")
