"""Small fixed workloads on a 1P1D cluster, and what one round of one comes to: what the perf gate compares.

A round is decided by its number: two trees that run the same rounds are sent the same prompts.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import GenerationSummary
from services.cli.cluster import Cluster
from services.cli.home import ClusterHome
from services.cli.models import cache_home, prepare_smollm2, prepare_tiny

REQUEST_TIMEOUT_S = 120.0
WORKERS = 2
USD_PER_WORKER_HOUR = 1.0
PEAK_SIZE, PEAK_TIMES = 768, 8


@dataclass(frozen=True, slots=True)
class Preset:
    """`requests` prompts of `prompt_tokens`, the first `shared_tokens` the same in all; the first goes alone, so that
    what is cached does not depend on who was quicker; then `concurrency` at a time."""

    weights: str
    requests: int
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    concurrency: int
    tiny: bool = False

    def model(self) -> Path:
        """Prepared on the first call."""
        return prepare_tiny("llama", cache_home() / "bench" / "tiny-llama") if self.tiny else prepare_smollm2()

    @property
    def vocabulary(self) -> int:
        return 250 if self.tiny else 40_000


PRESETS = {
    "ci": Preset("int8x2", requests=7, prompt_tokens=192, shared_tokens=64, new_tokens=24, concurrency=2),
    "tiny": Preset("dtype", requests=5, prompt_tokens=128, shared_tokens=64, new_tokens=16, concurrency=2, tiny=True),
}


@dataclass(frozen=True, slots=True)
class Round:
    """`mfu` is what the tokens need at least of arithmetic over what both workers' threads could have done meanwhile;
    `comm_share` the KV's time on the critical path over the requests' whole time; cost at USD_PER_WORKER_HOUR."""

    number: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float
    tpot_p95_ms: float
    mfu: float
    kv_hit_rate: float
    comm_share: float
    usd_per_million_tokens: float


METRICS = tuple(name for name in Round.__dataclass_fields__ if name != "number")


@dataclass(frozen=True, slots=True)
class _Answer:
    ttft_s: float
    tpot_s: float
    took_s: float
    summary: GenerationSummary


@dataclass(slots=True)
class Served:
    """A cluster that serves a preset."""

    preset: Preset
    client: AsyncClient
    parameters: int
    peak_flops: float

    async def round(self, number: int) -> Round:
        preset, rng = self.preset, np.random.default_rng(number)
        draw = rng.integers(3, preset.vocabulary, size=(preset.requests, preset.prompt_tokens))
        draw[:, : preset.shared_tokens] = draw[0, : preset.shared_tokens]
        first, *rest = draw.tolist()
        began_s, gate = time.perf_counter(), asyncio.Semaphore(preset.concurrency)

        async def gated(prompt: list[int]) -> _Answer:
            async with gate:
                return await self._ask(prompt)

        answers = [await self._ask(first), *await asyncio.gather(*map(gated, rest))]
        return self._round(number, answers, time.perf_counter() - began_s)

    async def _ask(self, prompt: list[int]) -> _Answer:
        arrivals: list[float] = []
        summary: GenerationSummary | None = None
        began_s = time.perf_counter()
        outputs = self.client.generate(prompt, max_tokens=self.preset.new_tokens, ignore_eos=True)
        async with aclosing(outputs):
            async for output in outputs:
                arrivals += [time.perf_counter()] * len(output.token_ids)
                summary = output.summary or summary
        assert summary is not None, "the last output has a summary"
        tpot_s = statistics.mean(after - before for before, after in itertools.pairwise(arrivals))
        return _Answer(arrivals[0] - began_s, tpot_s, arrivals[-1] - began_s, summary)

    def _round(self, number: int, answers: list[_Answer], took_s: float) -> Round:
        preset = self.preset
        ttft_ms, tpot_ms = ([1e3 * getattr(a, name) for a in answers] for name in ("ttft_s", "tpot_s"))
        cached = sum(a.summary.cached_tokens for a in answers)
        prompt_tokens = preset.prompt_tokens * len(answers)
        tokens = preset.new_tokens * len(answers)
        flops = 2 * self.parameters * (prompt_tokens - cached + tokens)
        usd = USD_PER_WORKER_HOUR * WORKERS * took_s / 3600
        return Round(
            number,
            *(float(np.percentile(values, q)) for values in (ttft_ms, tpot_ms) for q in (50, 95)),
            mfu=flops / (took_s * WORKERS * self.peak_flops),
            kv_hit_rate=cached / prompt_tokens,
            comm_share=sum(a.summary.transfer_exposed_ms for a in answers) / (1e3 * sum(a.took_s for a in answers)),
            usd_per_million_tokens=1e6 * usd / tokens,
        )


@asynccontextmanager
async def serving(preset: Preset, peak_flops: float) -> AsyncIterator[Served]:
    """For the time of the block; warm. Raises ConfigError, StartFailed."""
    model = preset.model()
    config = Config.model_validate(
        {
            "cluster": {"port_base": 0, "name": "bench-run"},
            "model": {"path": str(model)},
            "engine": {"num_blocks": 2048, "threads": 1, "weights": preset.weights},
            "kv_store": {"enabled": False},
        }
    )
    async with AsyncExitStack() as stack:
        home = ClusterHome("bench-run", Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(home.owned())
        cluster = Cluster(config, home)
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        client = AsyncClient(cluster.router_address, timeout_s=REQUEST_TIMEOUT_S)
        served = Served(preset, await stack.enter_async_context(client), num_parameters(model), peak_flops)
        await served.round(1 << 32)  # connections, allocators, first-use imports
        yield served


def num_parameters(model: Path) -> int:
    """Of all weights in the checkpoint. Raises ConfigError where there are none."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{model}: there is no *.safetensors file")
    total = 0
    for file in files:
        with safe_open(file, "np") as weights:
            total += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    return total


def measured_peak_flops() -> float:
    """Of one core: the best of a few float32 matrix products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, times = torch.ones(PEAK_SIZE, PEAK_SIZE), []
        for _ in range(PEAK_TIMES):
            began_s = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began_s)
    finally:
        torch.set_num_threads(threads)
    return 2 * PEAK_SIZE**3 / min(times)


def medians(rounds: list[Round]) -> dict[str, float]:
    rows = [asdict(found) for found in rounds]
    return {name: statistics.median(row[name] for row in rows) for name in METRICS}
