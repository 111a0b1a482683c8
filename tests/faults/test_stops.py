"""SIGSTOP for longer than the leases, in the middle of a handoff: clients get every token from others meanwhile, and
whoever was stopped goes on where it was without doing harm."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Arm
from tests.faults.test_kills import DEADLINE_S, NEW_TOKENS, complete, fresh_prompt
from tests.support.checks import eventually
from tests.support.cluster import RunningCluster
from tests.support.oracle import greedy


@pytest.mark.parametrize("stage", ["prefill.pinned", "source.sending", "receiver.pulling", "decode.streaming"])
async def test_a_worker_that_is_stopped_in_a_handoff(
    healthy: RunningCluster, arm: Arm, tiny_llama: Path, stage: str
) -> None:
    def stopped() -> list[psutil.Process]:
        processes = [psutil.Process(healthy.pid(member.id)) for member in healthy.cluster.workers]
        return [process for process in processes if process.status() == psutil.STATUS_STOPPED]

    async def who() -> list[psutil.Process]:
        return await asyncio.to_thread(stopped)

    prompts = [fresh_prompt(n) for n in (70, 16, 120)]
    arm(stage, signal.SIGSTOP)
    answers = asyncio.gather(*(complete(healthy, prompt) for prompt in prompts))
    (process,) = await eventually(who, bool, DEADLINE_S)
    try:
        await asyncio.sleep(1.5 * healthy.config.transport.lease_ttl_s)  # the fault itself
        os.kill(process.pid, signal.SIGCONT)
        done = await answers
    finally:
        process.send_signal(signal.SIGCONT)
        answers.cancel()
    assert [list(d.token_ids) for d in done] == [greedy(tiny_llama, p, NEW_TOKENS) for p in prompts]
