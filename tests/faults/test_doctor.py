"""`sagellm doctor handoff` on a running cluster, of a handoff whose source was killed while it sent."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from services.cli.cluster import child_env
from tests.faults.conftest import Arm
from tests.faults.test_kills import complete, fresh_prompt
from tests.support.cluster import RunningCluster

TIMEOUT_S = 60


async def doctor(cluster: RunningCluster, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", "doctor", "handoff", *argv, "--router", cluster.router_address]
    return await asyncio.to_thread(
        subprocess.run, command, env=child_env(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


async def test_it_says_who_failed_and_what_to_do(healthy: RunningCluster, arm: Arm) -> None:
    arm("source.sending")
    done = await complete(healthy, fresh_prompt(), max_tokens=4)
    told, shown, unknown = await asyncio.gather(
        doctor(healthy, done.request_id, "--json"), doctor(healthy, done.request_id), doctor(healthy, "nobody")
    )
    assert told.returncode == 0, told.stderr
    first, *others = _handoffs(told.stdout)
    assert (first["attempt"], first["state"], first["reason"]) == (1, "failed", "peer_lost_before_first_byte")
    assert (first["failed_at"], first["source"]) == ("source", None)
    killed = first["target"]["peer_id"]
    assert killed in first["diagnosis"] and killed in first["fix"]
    assert "restarted since" in first["diagnosis"] or "could not be asked" in first["diagnosis"]
    assert first["target"]["bytes"] == 0, "a small pull is sent in one call, and the source died before it"
    assert all(other["reason"] is None for other in others), "the next attempt went well"
    assert "peer_lost_before_first_byte" in shown.stdout and "pull begins" in shown.stdout
    assert unknown.returncode == 1
    assert "no worker remembers" in unknown.stderr


def _handoffs(printed: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed)["handoffs"]
    return found
