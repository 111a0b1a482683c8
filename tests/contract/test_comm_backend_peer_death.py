"""What a member of a group sees of a member's process that stops, or dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from sagellm_common.core.errors import PeerLost
from tests.support.comm_groups import Members


@pytest.mark.parametrize("backend", ["tcp", "gloo"])
async def test_a_process_that_stops_and_then_dies(backend: str) -> None:
    members = Members(backend)
    await members.start(1)
    (end,) = members.ends
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.comm_member_process",
        backend,
        end.address,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            addresses = [end.address, (await process.stdout.readline()).decode().strip()]
            one, two = [await end.join(name, addresses, timeout_s=60.0) for name in ("one", "two")]
            assert await process.stdout.readline() == b"joined 2\n"
        tensor = members.tensor(1 << 20)
        process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        async with asyncio.timeout(10):
            with pytest.raises(PeerLost):
                await one.all_reduce(tensor, timeout_s=0.3)  # it takes what we send, and says nothing
        waiting = asyncio.create_task(two.recv(tensor, 1, timeout_s=60.0))
        await asyncio.wait([waiting], timeout=0.05)
        process.kill()
        async with asyncio.timeout(10):  # long before the deadline
            with pytest.raises(PeerLost):
                await waiting
            with pytest.raises(PeerLost, match="broken"):
                await two.send(tensor, 1, timeout_s=60.0)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await members.close()
