"""One LMDeploy engine per model for the whole package: loading takes longer than most tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.types import SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput
from tests.support.oracle import greedy

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


@asynccontextmanager
async def running_engine(model: Path, **engine: Any) -> AsyncIterator[Driver]:
    config = Config.model_validate({"model": {"path": str(model)}, "engine": {"num_blocks": 128, **engine}})
    driver = Driver(make_engine(config))
    await driver.engine.start(driver.on_step)
    try:
        yield driver
    finally:
        await driver.engine.close()


@pytest.fixture(scope="session")
def hf_greedy() -> Callable[[Path, list[int], int], list[int]]:
    """The oracle: Hugging Face transformers, greedy, end-of-sequence ignored."""
    return greedy
