"""An engine of any kind, driven by a test."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sagellm_common.core.config import Config
from sagellm_common.core.types import SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput

STEP_TIMEOUT_S = 60.0


class Driver:
    """Submits to an engine and collects what each sequence answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[list[SequenceOutput]] = []
        self._queues: dict[str, asyncio.Queue[SequenceOutput]] = {}
        self._ids = iter(range(1_000_000))

    def on_step(self, outputs: Any) -> None:
        self.steps.append(list(outputs))
        for output in outputs:
            self._queues[output.request_id].put_nowait(output)

    def submit(
        self, tokens: list[int], max_new_tokens: int, request: dict[str, Any] | None = None, **sampling: Any
    ) -> str:
        request_id = f"request-{next(self._ids)}"
        self._queues[request_id] = asyncio.Queue()
        sampling = {"ignore_eos": True} | sampling
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
        self.engine.submit(replace(EngineRequest(request_id, as_token_ids(tokens), params), **(request or {})))
        return request_id

    async def outputs(self, request_id: str) -> AsyncIterator[SequenceOutput]:
        while True:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                output = await self._queues[request_id].get()
            yield output
            if output.finish_reason:
                return

    async def run(self, tokens: list[int], max_new_tokens: int, **kwargs: Any) -> tuple[list[int], SequenceOutput]:
        """All tokens and the last output."""
        found: list[int] = []
        async for output in self.outputs(self.submit(tokens, max_new_tokens, **kwargs)):
            found += output.token_ids
            last = output
        return found, last


def engine_config(model: Path, **engine: Any) -> Config:
    """For the LMDeploy of this process unless `patches` says otherwise."""
    engine = {"num_blocks": 128, "patches": os.environ.get("SAGELLM_ENGINE__PATCHES", "auto")} | engine
    return Config.model_validate({"model": {"path": str(model)}, "engine": engine})


@asynccontextmanager
async def running_engine(model: Path, **engine: Any) -> AsyncIterator[Driver]:
    driver = Driver(make_engine(engine_config(model, **engine)))
    await driver.engine.start(driver.on_step)
    try:
        yield driver
    finally:
        await driver.engine.close()


LENGTHS = (1, 2, 15, 16, 17, 32, 33, 100)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 259, size=n).tolist() for n in lengths]


async def handed_over(driver: Driver, tokens: list[int], max_new_tokens: int, **sampling: Any) -> list[int]:
    """Prefill with held blocks, copy them byte by byte to new ones, go on from there: a handoff without a wire."""
    pool = driver.engine.kv
    first, last = await driver.run(tokens, 1, request={"hold_blocks": True}, **sampling)
    held = last.held
    assert held is not None
    assert held.num_cached_tokens == len(tokens)
    target = pool.allocate(as_token_ids(tokens), len(tokens), "a salt of its own, so that nothing is shared")
    assert target.num_shared_blocks == 0
    for source, destination in zip(held.block_ids, target.block_ids, strict=True):
        pool.regions().block(int(destination))[:] = pool.regions().block(int(source))
    pool.free(held)
    target.num_cached_tokens = len(tokens)
    request = {"allocation": target, "num_emitted_tokens": 1}
    rest, _ = await driver.run(tokens + first, max_new_tokens, request=request, **sampling)
    return first + rest


def copied(model: Path, target: Path, **config: Any) -> Path:
    """The checkpoint with another config.json."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    (target / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | config))
    return target
