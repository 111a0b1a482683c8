"""Two ranks a worker: the same tokens, the same handoff, and a rank's death is the worker's."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from sagellm_common.client.aio import AsyncClient
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, DeadlineExceeded
from sagellm_common.engines import make_engine
from tests.integration.test_token_equality import complete_all, forty_prompts
from tests.support.checks import all_serving, assert_nothing_leaked, eventually
from tests.support.cluster import RunningCluster
from tests.support.oracle import continued, greedy
from tests.support.waiting import eventually as until

DEADLINE_S = 100.0
EXIT_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    settings = (
        "engine.tensor_parallel=2",
        "engine.max_prefill_tokens=64",
        "kv_store.enabled=false",
        "kv_store.fetch=always",  # of decode's cache: this model computes so little that it would hardly be worth it
        "router.resume_grace_s=90",  # a worker of two processes takes its time to start
    )
    with RunningCluster(*settings, restart=True) as running:
        yield running


def rank_of(cluster: RunningCluster, worker_id: str) -> psutil.Process:
    """The process of the worker's second rank."""
    (child,) = psutil.Process(cluster.pid(worker_id)).children()
    return child


def router_knows(cluster: RunningCluster, worker_id: str) -> bool:
    """Whether its index has all that the worker has cached."""
    worker = next(w for w in cluster.status().workers if w.record.worker_id == worker_id)
    return worker.kv is not None and worker.indexed is not None and worker.indexed.blocks >= worker.kv.cached_blocks > 0


async def gone(process: psutil.Process) -> None:
    async def running() -> bool:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

    await eventually(running, lambda alive: not alive, EXIT_TIMEOUT_S)


async def test_tokens_equal_transformers_over_the_handoff(cluster: RunningCluster, tiny_llama: Path) -> None:
    prompts = forty_prompts(Tokenizer.from_dir(tiny_llama), 400)[::2]
    for _ in range(2):  # the second time from the prefix caches
        done = await complete_all(cluster, prompts, 16)
        found = [list(d.token_ids) for d in done]
        assert {len(tokens) for tokens in found} == {16}
        assert found == [continued(tiny_llama, prompt, f) for prompt, f in zip(prompts, found, strict=True)]
    assert sum(d.summary.kv_bytes_transferred for d in done) > 0
    assert sum(d.summary.cached_tokens for d in done) > 0
    await assert_nothing_leaked(cluster)


async def test_the_next_turn_comes_from_decodes_cache(cluster: RunningCluster, tiny_llama: Path) -> None:
    turn = [5, 8, 9] * 20
    (first,) = await complete_all(cluster, [turn], 36)
    await assert_nothing_leaked(cluster)
    await until(lambda: router_knows(cluster, "decode-0"))
    longer = [*turn, *first.token_ids, 3, 4, 5]
    (second,) = await complete_all(cluster, [longer], 12)
    assert list(second.token_ids) == greedy(tiny_llama, longer, 12)
    # Of 60 tokens that prefill computed three blocks are full, and of 95 that have KV in the end five.
    found = {origin: tokens for origin, tokens in second.summary.kv_origins.items() if tokens}
    assert found == {"computed": len(longer) - 80, "prefill_cache": 48, "peer": 32}
    await assert_nothing_leaked(cluster)


async def test_ranks_stay_in_step_when_a_long_prompt_is_given_up(cluster: RunningCluster, tiny_llama: Path) -> None:
    await all_serving(cluster)
    long, short = [7, 9] * 400, list(range(3, 23))
    async with asyncio.timeout(DEADLINE_S), AsyncClient(cluster.router_address) as client:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                await client.complete(long, max_tokens=4, timeout_s=0.05)
        done = await client.complete(short, max_tokens=16, ignore_eos=True)
    assert list(done.token_ids) == greedy(tiny_llama, short, 16)
    await assert_nothing_leaked(cluster)


async def test_the_loss_of_a_rank_is_not_seen_by_the_client(cluster: RunningCluster, tiny_llama: Path) -> None:
    await all_serving(cluster)
    prompt, found = list(range(3, 73)), list[int]()
    async with asyncio.timeout(DEADLINE_S), AsyncClient(cluster.router_address) as client:
        outputs = client.generate(prompt, max_tokens=200, ignore_eos=True)
        async with aclosing(outputs):
            async for output in outputs:
                if not found:
                    rank_of(cluster, "decode-0").kill()
                found += output.token_ids
                summary = output.summary
    assert found == greedy(tiny_llama, prompt, 200)
    assert summary is not None
    assert summary.attempts == 2
    await all_serving(cluster)
    await assert_nothing_leaked(cluster)


async def test_no_rank_outlives_its_worker(cluster: RunningCluster) -> None:
    await all_serving(cluster)
    rank = rank_of(cluster, "prefill-0")
    await asyncio.to_thread(cluster.kill, "prefill-0", signal.SIGKILL)
    await gone(rank)
    await all_serving(cluster)


def test_heads_that_cannot_be_shared_out_are_named(tiny_llama: Path) -> None:
    config = Config.model_validate({"model": {"path": str(tiny_llama)}, "engine": {"tensor_parallel": 3}})
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel: 3 does not divide .*num_attention_heads 4"):
        make_engine(config)
