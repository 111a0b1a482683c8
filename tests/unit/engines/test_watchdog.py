"""An engine that hangs is declared ended, one that is idle or slow is not."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import EngineFailed
from sagellm_common.engines.watchdog import StepWatch, stuck
from tests.support.engines import running_engine


async def test_only_a_silent_step_is_stuck() -> None:
    clock = ManualClock()
    watch = StepWatch(clock)
    slept: list[float] = []
    step = ExitStack()

    async def sleep(seconds: float) -> None:
        """What the engine does meanwhile."""
        slept.append(seconds)
        match len(slept):
            case 1:  # a part of the step is done after 5 of the 6 seconds that were left
                clock.advance(5)
                watch.alive()
                clock.advance(1)
            case 2:  # the step ends, and nothing is to do
                step.close()
                clock.advance(seconds)
            case 5:  # another begins, and hangs
                clock.advance(7)
                step.enter_context(watch.step())
                clock.advance(3)
            case _:
                clock.advance(seconds)

    step.enter_context(watch.step())  # it computes when the watchdog looks for the first time
    clock.advance(4)
    await stuck(watch, 10, sleep)
    assert slept == [6, 9, 10, 10, 10, 7]


def test_a_sign_of_life_between_steps_starts_none() -> None:
    clock = ManualClock()
    watch = StepWatch(clock)
    watch.alive()
    clock.advance(100)
    assert watch.silent_s() == 0


async def test_an_engine_that_hangs_ends_and_says_where(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sagellm_common.engines.lmdeploy.device_cpu.install import CpuModelAgent

    released = threading.Event()
    try:
        with caplog.at_level(logging.CRITICAL):
            async with running_engine(tiny_llama, step_timeout_s=0.01) as driver:
                original = CpuModelAgent._forward_impl

                def hangs(agent: Any, inputs: Any) -> Any:
                    released.wait()
                    return original(agent, inputs)

                monkeypatch.setattr(CpuModelAgent, "_forward_impl", hangs)
                driver.submit([5, 6, 7], 4)
                async with asyncio.timeout(60):
                    await driver.engine.ended.wait()
                with pytest.raises(EngineFailed, match=r"no progress for 0\.01 s.*engine\.step_timeout_s"):
                    driver.engine.stats()
                with pytest.raises(EngineFailed, match="no progress"):
                    driver.submit([5, 6, 7], 4)
            # Closing did not wait for the thread: it is still there.
            assert "released.wait()" in caplog.text
            assert any(thread.name == "lmdeploy" for thread in threading.enumerate())
    finally:
        released.set()
        for thread in threading.enumerate():
            if thread.name == "lmdeploy":
                await asyncio.to_thread(thread.join, 60)
