"""The router as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sagellm_common.rpc.gen.sagellm.v1 import topology_pb2, topology_pb2_grpc

TIMEOUT_S = 60.0


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.router", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


@asynccontextmanager
async def router(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    process = await spawn(*arguments)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert process.stdout is not None
            yield process, json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_it_serves_and_ends_with_0_on_sigterm() -> None:
    async with router() as (process, ready):
        assert (ready["ready"], ready["id"], ready["pid"]) == (True, "router", process.pid)
        async with grpc.aio.insecure_channel(ready["address"], options=[("grpc.enable_http_proxy", 0)]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            topology = topology_pb2_grpc.TopologyServiceStub(channel)
            snapshot = await topology.Get(topology_pb2.GetTopologyRequest(), timeout=TIMEOUT_S)
            assert (snapshot.backend, len(snapshot.workers)) == ("embedded", 0)
        async with httpx.AsyncClient(trust_env=False) as http:
            metrics = await http.get(f"http://{ready['metrics_address']}/metrics")
        assert "sagellm_router_requests_total" in metrics.text
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "router.strategy=lifo"], "router.strategy"),
        (["--set", "router.no_such_key=1"], "no_such_key"),
        (["--port", "70000"], "--port 70000"),
        (["--set", "topology.backend=etcd"], "endpoints"),
    ],
)
async def test_bad_configuration_is_refused_by_name(arguments: list[str], says: str) -> None:
    process = await spawn(*arguments)
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode == 2 and not out
    text = err.decode()
    assert text.startswith("services.router: INVALID_CONFIG") and says in text and "Traceback" not in text


async def test_a_port_in_use_is_named() -> None:
    async with router() as (_, ready):
        port = ready["address"].rpartition(":")[2]
        process = await spawn("--port", port)
        async with asyncio.timeout(TIMEOUT_S):
            _, err = await process.communicate()
        assert process.returncode == 2 and ready["address"] in err.decode()
