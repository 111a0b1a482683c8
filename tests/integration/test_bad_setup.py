"""Services that must not start say why in one line; a newcomer that does not fit leaves the cluster as it was."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm_common.client.aio import AsyncClient
from services.cli.cluster import child_env
from tests.support.checks import all_serving, eventually
from tests.support.cluster import RunningCluster

TIMEOUT_S = 90.0


def run(*argv: str) -> tuple[int, str]:
    """Exit code and stderr of a service that is expected to give up by itself."""
    done = subprocess.run(
        [sys.executable, "-m", *argv], env=child_env(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("service", ["router", "prefill", "decode", "kv_store", "gateway"])
def test_an_unknown_key_is_named(service: str) -> None:
    code, said = run(f"services.{service}", "--set", "engine.num_block=5", "--router", "127.0.0.1:1")
    if service == "router":
        code, said = run("services.router", "--set", "engine.num_block=5")
    assert code != 0
    assert "engine.num_block" in said
    assert "engine.num_blocks" in said  # the nearest known key
    assert "Traceback" not in said


def test_a_port_in_use_is_named(cluster: RunningCluster) -> None:
    taken = cluster.router_address.rpartition(":")[2]
    code, said = run("services.router", "--port", taken)
    assert code != 0
    assert taken in said
    assert "Traceback" not in said


def test_a_missing_model_is_named(cluster: RunningCluster, tmp_path: Path) -> None:
    code, said = run("services.prefill", "--set", f"model.path={tmp_path}", "--router", cluster.router_address)
    assert code != 0
    assert "model.path" in said
    assert str(tmp_path) in said
    assert "Traceback" not in said


def test_a_second_worker_with_the_same_id_is_refused(cluster: RunningCluster) -> None:
    code, said = run("services.kv_store", "--id", "kv-store-0", "--router", cluster.router_address)
    assert code != 0
    assert "WORKER_ID_TAKEN" in said
    assert "kv-store-0" in said
    assert cluster.alive("kv-store-0")


async def test_a_worker_with_another_layout_is_not_paired(cluster: RunningCluster) -> None:
    settings = ["--set", f"model.path={cluster.model_path}", "--set", "engine.weights=int8"]
    odd = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.decode", *settings, "--id", "odd", "--router", cluster.router_address),
        env=child_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with AsyncClient(cluster.router_address) as client:

            async def ids() -> set[str]:
                return {worker.record.worker_id for worker in (await client.topology()).workers}

            await eventually(ids, lambda found: "odd" in found, TIMEOUT_S)
            for i in range(6):
                done = await client.complete(f"{i}: never with the odd one", max_tokens=4, ignore_eos=True)
                assert done.summary.decode_worker_id == "decode-0"
                assert done.summary.kv_bytes_transferred > 0
            log = await asyncio.to_thread(cluster.log, "router")
            assert "KV layout differs: model_fingerprint" in log
            odd.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(odd.wait(), 30) == 0
            await eventually(ids, lambda found: "odd" not in found, 5.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            odd.kill()
        await odd.wait()
    await all_serving(cluster)
