"""Host memory below a worker's pool, through the services: more than is copied at a time comes back, too."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sagellm_common.core.clock import SystemClock
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import WorkerRole
from sagellm_common.kv_runtime import host_cache
from sagellm_common.kv_runtime.host_cache import HostCache
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.topology_server import topology_server
from tests.support.workers import decode_all, generate, request, worker


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


def engine() -> SimulatedEngine:
    made = SimulatedEngine(num_blocks=20)
    made.kv.keep_below(HostCache(1 << 20, made.kv.layout, SystemClock()))
    return made


async def test_all_of_an_evicted_prompt_comes_back(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        worker(WorkerRole.PREFILL, router, engine=engine()) as prefill,
        worker(WorkerRole.DECODE, router, engine=engine()) as decode,
    ):
        monkeypatch.setattr(host_cache, "MAX_COPY_BYTES", 3 * prefill.engine.kv.layout.block_bytes)
        prompts = [[start + n for n in range(60)] for start in (1, 100)]
        for turn in range(2):
            for n, prompt in enumerate(prompts):
                wanted = request(prompt, request_id=f"{turn}.{n}")
                done = await generate(prefill, decode, wanted)
                assert done.tokens == reference(prompt, wanted.sampling)[0]
                await prefill.idle()
                await decode.idle()
                if turn:  # 15 blocks and four of the answer, of 20: the other prompt has taken most of them
                    assert done.prefill.cached_tokens == 56
                    assert done.prefill.origins.host_tokens > 3 * 4
        alone = await decode_all(decode, request(prompts[0], request_id="alone"), [], None)
        report = alone[0].prompt_kv
        assert report is not None and report.cached_tokens >= 56
        assert report.origins.host_tokens > 3 * 4
