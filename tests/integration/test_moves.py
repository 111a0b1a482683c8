"""Running generations move from a decode worker that leaves to another, KV and all; the client's stream goes on.

Real router, workers, leases and byte path; only the engines are simulated, whose tokens depend on every byte of KV.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sagellm_common.client.router import RouterClient
from sagellm_common.core.errors import Draining
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import FinishReason, SamplingParams, WorkerRole
from sagellm_common.rpc import codec
from sagellm_common.rpc.sessions import DecodeStep
from services.autoscaler.pool import Pool
from services.router.moves import MOVES
from tests.support.router_harness import RouterHarness, router_harness
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import Worker, decode_all, request, worker

PROMPT = list(range(1, 15))
NEW_TOKENS = 60


# ---- between workers ----


@pytest.fixture
async def topology() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@pytest.fixture
async def trio(topology: str) -> AsyncIterator[tuple[Worker, Worker, Worker]]:
    async with AsyncExitStack() as stack:
        roles = {"prefill-0": WorkerRole.PREFILL, "decode-0": WorkerRole.DECODE, "decode-1": WorkerRole.DECODE}
        made = [await stack.enter_async_context(worker(role, topology, worker_id=name)) for name, role in roles.items()]
        yield made[0], made[1], made[2]


async def stopped_after(count: int, prefill: Worker, decode: Worker, wanted: Any) -> tuple[list[int], DecodeStep]:
    """Runs a request until so many tokens are there, and has it handed over; its tokens and last step."""
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
    tokens = list(first.token_ids)
    steps = decode.decode_session.decode(wanted, 1, tokens, first.source, timeout_s=TIMEOUT_S)
    async with aclosing(steps):
        async for step in steps:
            assert step.index == len(tokens)
            tokens += step.token_ids
            if len(tokens) == count:
                decode.decode_session.hand_over("r1", 1)
            last = step
    return tokens, last


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}, {"num_logprobs": 1}], ids=repr)
@pytest.mark.parametrize("count", [2, 19])
async def test_another_worker_goes_on_where_it_was(
    trio: tuple[Worker, Worker, Worker], sampling: dict[str, Any], count: int
) -> None:
    prefill, here, there = trio
    wanted = request(PROMPT, NEW_TOKENS, **sampling)
    tokens, last = await stopped_after(count, prefill, here, wanted)
    assert last.finish_reason is FinishReason.CANCELLED and last.handed_over is not None
    source = last.handed_over.source
    assert source is not None and source.worker_id == "decode-0"
    assert source.num_tokens == len(PROMPT) + len(tokens) - 1, "all but the last token's KV, which is not computed yet"
    assert here.load.pinned_transfers == 1 and here.load.running_requests == 0
    await there.decode_session.reserve(wanted, 2, tokens, timeout_s=TIMEOUT_S)
    steps = await decode_all(there, wanted, tokens, source, 2)
    assert tokens + [token for step in steps for token in step.token_ids] == reference(PROMPT, wanted.sampling)[0]
    assert steps[0].transfer is not None and steps[0].transfer.bytes
    assert all(len(step.logprobs) == (1 if sampling.get("num_logprobs") else 0) for step in steps if step.token_ids)
    for made in trio:
        await made.idle()


async def test_blocks_reserved_before_the_last_tokens_came_are_filled_as_far_as_they_go(
    trio: tuple[Worker, Worker, Worker],
) -> None:
    prefill, here, there = trio
    wanted = request(PROMPT, NEW_TOKENS)
    tokens, last = await stopped_after(25, prefill, here, wanted)
    assert last.handed_over is not None
    await there.decode_session.reserve(wanted, 2, tokens[:9], timeout_s=TIMEOUT_S)
    steps = await decode_all(there, wanted, tokens, last.handed_over.source, 2)
    assert tokens + [token for step in steps for token in step.token_ids] == reference(PROMPT, wanted.sampling)[0]
    assert steps[0].transfer is not None and steps[0].transfer.blocks == 6  # of 23 tokens
    for made in trio:
        await made.idle()


async def test_what_is_handed_over_and_not_wanted_is_freed(trio: tuple[Worker, Worker, Worker]) -> None:
    prefill, here, _ = trio
    await stopped_after(5, prefill, here, request(PROMPT, NEW_TOKENS))
    assert here.load.pinned_transfers == 1
    here.decode_session.cancel("r1", 1)
    await here.idle()


async def test_handing_over_what_is_not_there_is_a_no_op(trio: tuple[Worker, Worker, Worker]) -> None:
    prefill, here, _ = trio
    wanted = request(PROMPT, 8)
    tokens, last = await stopped_after(100, prefill, here, wanted)
    here.decode_session.hand_over("r1", 1)
    here.decode_session.hand_over("never heard of", 1)
    assert (tokens, last.finish_reason) == reference(PROMPT, wanted.sampling)
    await here.idle()


# ---- by the router ----


@dataclass
class Stream:
    """One request through the router, with a prompt of its own; `began` once a token came from decode."""

    prompt: list[int]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = None

    async def summary(self) -> Any:
        """Once it has ended, and is what one engine alone would have generated."""
        assert self.task is not None
        found = await self.task
        assert self.tokens == reference(self.prompt, self.sampling)[0]
        return found


class Lab:
    def __init__(self, router: RouterHarness, stack: AsyncExitStack) -> None:
        self.router = router
        self._stack = stack
        self.workers: dict[str, Worker] = {}

    async def add(self, worker_id: str, role: WorkerRole, **engine: Any) -> Worker:
        address, simulated = self.router.router.address, SimulatedEngine(**engine)
        made = await self._stack.enter_async_context(
            worker(role, address, worker_id=worker_id, engine=simulated, changeable=True)
        )
        self.workers[worker_id] = made
        await self.knows(made)
        return made

    async def knows(self, made: Worker) -> None:
        """The router sends it work of the role that it has."""
        record, links = made.runtime.record, self.router.router.workers

        def known() -> bool:
            link = links.find(record.worker_id, record.incarnation)
            return link is not None and link.usable and link.record.role is record.role

        await eventually(known)

    async def generate(self, request_id: str) -> Any:
        return await self.start(request_id).summary()

    def start(self, request_id: str, **sampling: Any) -> Stream:
        prompt = [zlib.crc32(request_id.encode()) % 900, *PROMPT]
        stream = Stream(prompt, SamplingParams(max_new_tokens=NEW_TOKENS, **sampling))

        async def read() -> Any:
            async for message in self.router.call(
                prompt, model="simulated", request_id=request_id, max_new_tokens=NEW_TOKENS, **sampling
            ):
                output = codec.decode_output(message)
                assert output.index == len(stream.tokens)
                stream.tokens += output.token_ids
                if len(stream.tokens) > 1:
                    stream.began.set()
            return output.summary

        stream.task = asyncio.create_task(read())
        return stream

    async def idle(self) -> None:
        for made in self.workers.values():
            await made.idle()


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with router_harness() as router, AsyncExitStack() as stack:
        made = Lab(router, stack)
        await made.add("prefill-0", WorkerRole.PREFILL)
        await made.add("decode-0", WorkerRole.DECODE)
        yield made


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}], ids=repr)
async def test_a_drain_moves_what_runs(lab: Lab, sampling: dict[str, Any]) -> None:
    here = lab.workers["decode-0"]
    streams = [lab.start(f"r{n}", **sampling) for n in range(3)]
    for stream in streams:
        await stream.began.wait()
    here.engine.pause()  # or it would be through before anybody could take over
    there = await lab.add("decode-1", WorkerRole.DECODE)
    draining = asyncio.create_task(here.runtime.drain(TIMEOUT_S))
    await eventually(lambda: there.load.reservations > 0)
    here.engine.resume()
    summaries = [await stream.summary() for stream in streams]
    assert await draining == 0
    assert {s.decode_worker_id for s in summaries} == {"decode-1"}
    assert {s.attempts for s in summaries} == {1}, "a move is no failure"
    assert "hand over" in [event.stage for event in (await lab.router.explain("r0")).events]
    await lab.idle()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}], ids=repr)
async def test_a_drain_moves_what_its_clients_read_themselves(sampling: dict[str, Any]) -> None:
    """Tokens come straight from the decode worker: its client is told, and brings the next one what it needs."""
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(router_harness(tokens="direct"))
        client = await stack.enter_async_context(RouterClient(router.router.address, tokens="direct"))
        lab = Lab(router, stack)
        await lab.add("prefill-0", WorkerRole.PREFILL)
        here = await lab.add("decode-0", WorkerRole.DECODE)
        wanted = [request([n, *PROMPT], NEW_TOKENS, f"r{n}", **sampling) for n in range(3)]
        began, tokens = asyncio.Event(), [list[int]() for _ in wanted]

        async def read(which: int) -> Any:
            async with aclosing(client.generate(wanted[which], TIMEOUT_S)) as outputs:
                async for output in outputs:
                    assert output.index == len(tokens[which])
                    tokens[which] += output.token_ids
                    if min(map(len, tokens)) > 1 and not began.is_set():
                        here.engine.pause()
                        began.set()
            return output.summary

        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(read(which)) for which in range(3)]
            await began.wait()
            there = await lab.add("decode-1", WorkerRole.DECODE)
            draining = group.create_task(here.runtime.drain(TIMEOUT_S))
            await eventually(lambda: here.engine.taken_out)
            here.engine.resume()
        assert draining.result() == 0
        assert tokens == [reference(w.prompt_token_ids.tolist(), w.sampling)[0] for w in wanted]
        summaries = [task.result() for task in reading]
        assert {s.decode_worker_id for s in summaries} == {"decode-1"}
        assert {s.attempts for s in summaries} == {1}, "a move is no failure"
        assert there.runtime.kv_stats().balanced
        assert "hand over" in [event.stage for event in (await client.explain("r0")).events]
        await lab.idle()


async def test_what_nobody_can_take_is_finished(lab: Lab) -> None:
    here = lab.workers["decode-0"]
    await lab.add("decode-1", WorkerRole.DECODE, num_blocks=4)
    stream = lab.start("r")
    await stream.began.wait()
    here.engine.pause()
    refused = MOVES.labels("no_room")._value
    before = refused.get()
    draining = asyncio.create_task(here.runtime.drain(TIMEOUT_S))
    await eventually(lambda: refused.get() > before)
    here.engine.resume()
    assert (await stream.summary()).decode_worker_id == "decode-0"
    assert await draining == 0
    await lab.idle()


# ---- roles ----


async def test_a_role_changes_under_way_and_back(lab: Lab) -> None:
    """decode → prefill → both: what runs moves on, and new work comes as the role says."""
    here, prefill = lab.workers["decode-0"], lab.workers["prefill-0"]
    there = await lab.add("decode-1", WorkerRole.DECODE)
    here.engine.pause()
    there.engine.pause()
    streams = [lab.start(f"r{n}") for n in range(4)]
    await eventually(lambda: here.load.running_requests == there.load.running_requests == 2)
    changing = asyncio.create_task(here.runtime.set_role(WorkerRole.PREFILL, TIMEOUT_S))
    await eventually(lambda: there.load.reservations > 0)
    here.engine.resume()
    there.engine.resume()
    assert await changing == 0
    assert {(await stream.summary()).decode_worker_id for stream in streams} == {"decode-1"}
    await lab.knows(here)
    found = [await lab.generate(f"s{n}") for n in range(4)]
    assert {s.prefill_worker_id for s in found} == {"prefill-0", "decode-0"}
    assert {s.decode_worker_id for s in found} == {"decode-1"}

    assert await prefill.runtime.set_role(WorkerRole.BOTH, TIMEOUT_S) == 0
    assert await here.runtime.set_role(WorkerRole.DECODE, TIMEOUT_S) == 0
    await lab.knows(prefill)
    await lab.knows(here)
    found = [await lab.generate(f"t{n}") for n in range(6)]
    assert "decode-0" in {s.decode_worker_id for s in found}
    assert {s.prefill_worker_id for s in found} <= {"prefill-0", ""}
    assert {s.attempts for s in found} == {1}
    await lab.idle()


async def test_one_worker_of_both_roles_serves_alone(lab: Lab) -> None:
    here = lab.workers["prefill-0"]
    await here.runtime.set_role(WorkerRole.BOTH, TIMEOUT_S)
    await lab.workers["decode-0"].runtime.drain(TIMEOUT_S)
    await lab.knows(here)
    assert (await lab.generate("alone")).decode_worker_id == "prefill-0"
    await lab.idle()


async def test_work_of_the_old_role_is_finished_where_nobody_takes_it(lab: Lab) -> None:
    here = lab.workers["decode-0"]
    stream = lab.start("r")
    await stream.began.wait()
    here.engine.pause()
    assert await here.runtime.set_role(WorkerRole.PREFILL, 0.01) == 1, "it runs on"
    with pytest.raises(Draining, match="takes no new decode work"):
        here.runtime.check_accepting(WorkerRole.DECODE)
    here.engine.resume()
    assert (await stream.summary()).decode_worker_id == "decode-0"
    await lab.idle()


async def test_a_refusal_that_the_router_did_not_expect_costs_no_request(lab: Lab) -> None:
    """It may have sent the request before it heard of the change."""
    there = await lab.add("decode-1", WorkerRole.DECODE)
    there.engine.pause()
    there.runtime._record = replace(there.runtime.record, role=WorkerRole.PREFILL)  # and nobody is told
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(lab.generate(f"r{n}")) for n in range(3)]
    assert {task.result().decode_worker_id for task in running} == {"decode-0"}
    assert {task.result().attempts for task in running} == {1}
    await lab.idle()


async def test_the_autoscaler_changes_the_role_of_the_least_busy_and_what_runs_there_moves(lab: Lab) -> None:
    decoders = lab.workers["decode-0"], await lab.add("decode-1", WorkerRole.DECODE)
    async with RouterClient(lab.router.router.address) as client:
        pool = Pool(client, None)
        pool.look((await client.topology()).workers)
        for made in decoders:
            made.engine.pause()
        streams = [lab.start(f"r{n}") for n in range(3)]
        await eventually(lambda: sum(made.load.running_requests for made in decoders) == 3)
        least = min(decoders, key=lambda made: made.load.running_requests)
        (other,) = {*decoders} - {least}
        pool.flip(1)
        pool.look((await client.topology()).workers)
        settling = asyncio.create_task(pool.settle())
        await eventually(lambda: other.load.reservations > 0)
        for made in decoders:
            made.engine.resume()
        assert await settling == f"{least.runtime.record.worker_id} from decode to prefill"
    summaries = [await stream.summary() for stream in streams]
    assert {(s.attempts, s.decode_worker_id) for s in summaries} == {(1, other.runtime.record.worker_id)}
    await lab.idle()
