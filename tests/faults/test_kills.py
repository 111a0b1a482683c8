"""kill -9 for every party at every stage of the handoff: the client's stream equals the undisturbed one."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.client.aio import AsyncClient, Completion
from sagellm_common.core.errors import Unreachable
from sagellm_common.core.types import FinishReason, WorkerRole
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind
from tests.faults.conftest import Arm
from tests.support.checks import all_serving, eventually
from tests.support.cluster import RunningCluster
from tests.support.oracle import greedy

DEADLINE_S = 60.0
NEW_TOKENS = 40
_seeds = itertools.count(1000)


def fresh_prompt(tokens: int = 70) -> list[int]:
    """One that no cache has seen."""
    return np.random.default_rng(next(_seeds)).integers(3, 250, size=tokens).tolist()


async def complete(cluster: RunningCluster, prompt: list[int], max_tokens: int = NEW_TOKENS) -> Completion:
    async with asyncio.timeout(DEADLINE_S), AsyncClient(cluster.router_address) as client:
        return await client.complete(prompt, max_tokens=max_tokens, ignore_eos=True, timeout_s=DEADLINE_S)


STAGES = [
    "prefill.computing",  # before the pull, nothing computed
    "prefill.pinned",  # before the pull, everything computed
    "source.sending",  # during the pull, at the source
    "decode.reserved",
    "receiver.pulling",  # during the pull, at the receiver
    "decode.pulled",  # all there, not committed
]


@pytest.mark.parametrize("stage", STAGES)
async def test_a_kill_during_the_handoff_is_not_seen_by_any_client(
    healthy: RunningCluster, arm: Arm, tiny_llama: Path, stage: str
) -> None:
    """The one whose handoff it was, and the others under way."""
    prompts = [fresh_prompt(n) for n in (70, 5, 16, 33, 64, 120, 7)]
    arm(stage)
    done = await asyncio.gather(*(complete(healthy, p) for p in prompts))
    assert [list(d.token_ids) for d in done] == [greedy(tiny_llama, p, NEW_TOKENS) for p in prompts]
    assert max(d.summary.attempts for d in done) > 1


@pytest.mark.parametrize("stage", ["source.sending", "receiver.pulling"])
async def test_a_kill_while_decode_pulls_what_is_being_computed(
    healthy: RunningCluster, arm: Arm, tiny_llama: Path, stage: str
) -> None:
    """The first chunk is on its way, later ones are not computed yet."""
    prompt = fresh_prompt(400)
    arm(stage)
    done = await complete(healthy, prompt)
    assert list(done.token_ids) == greedy(tiny_llama, prompt, NEW_TOKENS)
    assert done.summary.attempts > 1
    async with AsyncClient(healthy.router_address) as client:
        events = (await client.explain(done.request_id)).events
    assert "pull ahead" in [event.stage for event in events]


@pytest.mark.parametrize("kind", [PlanNodeKind.PREFILL, PlanNodeKind.DECODE])
async def test_a_kill_in_mid_stream_leaves_one_unbroken_stream(
    healthy: RunningCluster, tiny_llama: Path, kind: PlanNodeKind
) -> None:
    prompt, new_tokens, request_id = fresh_prompt(), 400, f"mid-stream-{kind}"
    found: list[int] = []
    killed_at = 0
    async with asyncio.timeout(DEADLINE_S), AsyncClient(healthy.router_address) as client:
        outputs = client.generate(prompt, max_tokens=new_tokens, ignore_eos=True, request_id=request_id)
        async with aclosing(outputs):
            async for output in outputs:
                found += output.token_ids
                summary = output.summary
                if len(found) >= 5 and not killed_at:
                    plan = (await client.explain(request_id)).plan
                    worker_id = next(node.worker_id for node in plan.nodes if node.kind is kind)
                    await asyncio.to_thread(healthy.kill, worker_id)
                    killed_at = len(found)
    assert 0 < killed_at < new_tokens
    assert found == greedy(tiny_llama, prompt, new_tokens)
    assert summary is not None
    assert summary.attempts == (2 if kind is PlanNodeKind.DECODE else 1)


async def test_a_seeded_sample_resumes_as_itself(healthy: RunningCluster, arm: Arm) -> None:
    prompt = fresh_prompt()
    sampling = {"temperature": 0.9, "top_k": 40, "seed": 11, "ignore_eos": True, "max_tokens": NEW_TOKENS}
    async with AsyncClient(healthy.router_address) as client:
        undisturbed = await client.complete(prompt, **sampling)
        arm("decode.reserved")
        assert (await client.complete(prompt, **sampling)).token_ids == undisturbed.token_ids


async def copies(healthy: RunningCluster, tokens: list[int]) -> int:
    """How many stores hold every full block of these tokens."""
    workers = [w.record for w in (await asyncio.to_thread(healthy.status)).workers]
    layout = next(w.model.kv_layout for w in workers if w.model is not None)
    hashes = block_hashes(np.array(tokens, np.int32), layout.block_size_tokens, root_hash(layout))
    asked = kv_pb2.KvLookupRequest(block_hashes=codec.encode_hashes(hashes), layout=codec.encode_layout(layout))
    found = 0
    async with ChannelPool() as channels:
        for store in (w for w in workers if w.role is WorkerRole.KV_STORE):
            stub = kv_pb2_grpc.KvStoreServiceStub(channels.get(store.address))
            answer = await call(stub.Lookup, asked, timeout_s=5.0, response=kv_pb2.KvLookupResponse)
            found += answer.num_blocks == len(hashes)
    return found


async def offloaded(healthy: RunningCluster, prompt: list[int], expected: list[int]) -> None:
    """Returns once the prompt and its answer are in two stores, and in no prefill worker's cache."""

    async def copies_after_another() -> int:
        """A store that was lost a moment ago is left alone for a while: it is offered the blocks again."""
        assert list((await complete(healthy, prompt)).token_ids) == expected
        return await copies(healthy, [*prompt, *expected[:-1]])

    await eventually(copies_after_another, lambda now: now >= 2, DEADLINE_S)
    for worker_id in ("prefill-0", "prefill-1"):  # their caches are gone, the stores' are not
        await asyncio.to_thread(healthy.restart, worker_id)
    await all_serving(healthy)  # until the router knows them, decode stands in for prefill


@pytest.mark.parametrize("stage", ["store.putting", "store.getting", "source.sending"])
async def test_the_loss_of_a_store_costs_no_request_and_with_a_replica_no_hit(
    healthy: RunningCluster, arm: Arm, tiny_llama: Path, stage: str
) -> None:
    """At the offload, at the fetch, and in the middle of the pull that a fetch begins with. Of three stores one is
    killed; when it is back, empty, the others give it what is its to keep: each block is in two of them again."""
    prompt = fresh_prompt(100)
    expected = greedy(tiny_llama, prompt, NEW_TOKENS)
    if stage != "store.putting":
        await offloaded(healthy, prompt, expected)
    arm(stage)
    done = await complete(healthy, prompt)
    assert list(done.token_ids) == expected
    assert done.summary.attempts == 1
    if stage != "store.putting":
        assert done.summary.store_tokens == 96
    assert list((await complete(healthy, prompt)).token_ids) == expected
    if stage != "store.putting":
        await all_serving(healthy)
        await eventually(lambda: copies(healthy, [*prompt, *expected[:-1]]), lambda now: now >= 2, DEADLINE_S)


async def test_a_stream_waits_for_the_restart_when_no_decode_worker_is_left(
    healthy: RunningCluster, tiny_llama: Path
) -> None:
    prompt, new_tokens = fresh_prompt(), 300
    found: list[int] = []
    async with asyncio.timeout(DEADLINE_S), AsyncClient(healthy.router_address) as client:
        outputs = client.generate(prompt, max_tokens=new_tokens, ignore_eos=True)
        async with aclosing(outputs):
            async for output in outputs:
                if not found:
                    for worker_id in ("decode-0", "decode-1"):
                        await asyncio.to_thread(healthy.kill, worker_id)
                found += output.token_ids
    assert found == greedy(tiny_llama, prompt, new_tokens)


async def test_both_decode_workers_gone_is_a_typed_error_or_waited_out(
    healthy: RunningCluster, tiny_llama: Path
) -> None:
    """Within the deadline the answer is either right or one that says when to try again."""
    prompt = fresh_prompt()
    for worker_id in ("decode-0", "decode-1"):
        await asyncio.to_thread(healthy.kill, worker_id)
    try:
        done = await complete(healthy, prompt)
    except Unreachable as err:
        assert err.retry_after_s
    else:
        assert list(done.token_ids) == greedy(tiny_llama, prompt, NEW_TOKENS)


@pytest.mark.parametrize("after_tokens", [0, 1, 10])
async def test_a_client_that_leaves_frees_everything(healthy: RunningCluster, after_tokens: int) -> None:
    async with asyncio.timeout(DEADLINE_S), AsyncClient(healthy.router_address) as client:
        outputs = client.generate(fresh_prompt(200), max_tokens=1000, ignore_eos=True)
        if after_tokens:
            async with aclosing(outputs):
                count = 0
                async for output in outputs:
                    count += len(output.token_ids)
                    if count >= after_tokens:
                        break
        else:
            task = asyncio.create_task(anext(outputs))
            done, _ = await asyncio.wait({task}, timeout=0.005)
            if not done:
                task.cancel()
                await asyncio.wait({task})
            await outputs.aclose()
    # `healthy` checks that every block came back.


async def test_a_cancel_by_id_reaches_every_party(healthy: RunningCluster) -> None:
    async with asyncio.timeout(DEADLINE_S), AsyncClient(healthy.router_address) as client:
        outputs = client.generate(fresh_prompt(), max_tokens=1500, ignore_eos=True, request_id="cancel-me")
        async with aclosing(outputs):
            async for output in outputs:
                last = output
                await client.cancel("cancel-me")
                await client.cancel("cancel-me")
        assert last.finish_reason is FinishReason.CANCELLED
        await client.cancel("never heard of")
