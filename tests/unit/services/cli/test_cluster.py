from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import WorkerRole
from services.cli import cluster as cluster_module
from services.cli.cluster import Cluster, ClusterEvent, StartFailed, child_env
from services.cli.home import ClusterHome
from tests.unit.services.cli.conftest import Journal, MakeCluster


class Events:
    """What happened to a cluster; `until` waits for something to happen."""

    def __init__(self, cluster: Cluster) -> None:
        self._seen: list[tuple[str, str]] = []
        self._more = asyncio.Event()
        cluster.on_event = self._add

    def _add(self, event: ClusterEvent) -> None:
        self._seen.append((event.kind, event.process_id))
        self._more.set()

    def of(self, kind: str) -> list[str]:
        return [process_id for seen, process_id in self._seen if seen == kind]

    async def until(self, kind: str, process_id: str, times: int = 1) -> None:
        async with asyncio.timeout(20):
            while self._seen.count((kind, process_id)) < times:
                self._more.clear()
                await self._more.wait()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_starts_router_then_workers_then_gateway_and_stops_the_other_way(
    make_cluster: MakeCluster, journal: Journal
) -> None:
    cluster = make_cluster(num_prefill=2)
    await cluster.start()
    started = journal.lines("start")
    assert started[0] == "router"
    assert sorted(started[1:-1]) == ["decode-0", "kv-store-0", "prefill-0", "prefill-1"]
    assert started[-1] == "gateway"
    pids = [member.process.pid for member in cluster.members.values() if member.process]
    assert len(pids) == 6

    await cluster.stop()
    stopped = journal.lines("stop")
    assert stopped[0] == "gateway"
    assert stopped[-1] == "router"
    assert not any(map(alive, pids))
    await cluster.stop()


async def test_state_file_says_where_everything_is(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("", "kv_store.enabled=false", "model.path=/models/m")
    await cluster.start()
    state = cluster.home.read()
    assert state is not None
    assert state.ready
    assert (state.pid, state.model_path) == (os.getpid(), "/models/m")
    assert state.router_address == cluster.router_address != ""
    assert state.gateway_url == cluster.gateway_url
    assert {p.id: p.role for p in state.processes} == {
        "router": "router",
        "prefill-0": "prefill",
        "decode-0": "decode",
        "gateway": "gateway",
    }
    await cluster.stop()
    state = cluster.home.read()
    assert state is not None
    assert state.processes == ()


async def test_a_process_that_fails_to_start_is_named_with_what_it_said(
    make_cluster: MakeCluster, journal: Journal
) -> None:
    cluster = make_cluster("decode-0=fail")
    with pytest.raises(StartFailed, match="decode-0 exited with code 2") as failed:
        await cluster.start()
    assert failed.value.tail == ("INVALID_CONFIG: no such thing",)
    assert failed.value.log.name == "decode-0.log"
    await cluster.stop()
    assert "gateway" not in journal.lines("start")
    assert all(member.process is None for member in cluster.members.values())


async def test_a_process_that_is_never_ready_is_given_up(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "START_TIMEOUT_S", 1.0)
    cluster = make_cluster("router=hang")
    with pytest.raises(StartFailed, match="router not ready within 1 s"):
        await cluster.start()


async def test_a_process_that_cannot_even_be_started_is_named(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make_cluster()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(StartFailed, match="router cannot be started: .*no-python"):
        async with asyncio.timeout(10):
            await cluster.start()


async def test_a_dead_worker_comes_back_under_its_id(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    events = Events(cluster)
    await cluster.start()
    member = cluster.members["decode-0"]
    assert member.process
    first_pid = member.process.pid
    await cluster.kill("decode-0")
    await events.until("ready", "decode-0", times=2)
    assert events.of("died") == ["decode-0"]
    assert events.of("restarting") == ["decode-0"]
    assert member.process
    assert member.process.pid != first_pid


async def test_a_router_comes_back_on_its_port(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    events = Events(cluster)
    await cluster.start()
    address = cluster.router_address
    await cluster.kill("router")
    await events.until("ready", "router", times=2)
    assert cluster.router_address == address


async def test_a_process_that_keeps_dying_is_left_alone(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "BACKOFF_S", (0.0, 0.0))
    cluster = make_cluster()
    events = Events(cluster)
    await cluster.start()
    monkeypatch.setenv("FAKE", "prefill-0=fail")
    await cluster.kill("prefill-0")
    await events.until("gave up", "prefill-0")
    assert events.of("restarting") == ["prefill-0"] * 2
    assert cluster.members["prefill-0"].process is None


async def test_without_restart_the_dead_stay_dead_until_told(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(restart=False)
    events = Events(cluster)
    await cluster.start()
    await cluster.kill("prefill-0")
    await events.until("died", "prefill-0")
    assert cluster.members["prefill-0"].process is None
    await cluster.restart_process("prefill-0")
    assert cluster.members["prefill-0"].process is not None
    assert events.of("restarting") == []


async def test_workers_join_and_leave(make_cluster: MakeCluster, journal: Journal) -> None:
    cluster = make_cluster()
    await cluster.start()
    assert await cluster.add_worker(WorkerRole.DECODE) == "decode-1"
    assert "decode-1" in journal.lines("start")
    await cluster.remove_worker("decode-0")
    assert "decode-0" in journal.lines("stop")
    assert await cluster.add_worker(WorkerRole.DECODE) == "decode-0"
    assert {m.id for m in cluster.workers} == {"prefill-0", "kv-store-0", "decode-0", "decode-1"}


async def test_a_process_that_ignores_sigterm_is_killed(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "STOP_MARGIN_S", 0.2)
    cluster = make_cluster("prefill-0=stubborn", "cluster.drain_grace_s=0")
    await cluster.start()
    process = cluster.members["prefill-0"].process
    assert process
    await cluster.stop()
    assert not alive(process.pid)


async def test_a_process_may_print_as_much_as_it_likes(make_cluster: MakeCluster, journal: Journal) -> None:
    cluster = make_cluster("decode-0=chatty")
    await cluster.start()
    await cluster.stop()
    assert journal.lines("wrote") == ["decode-0"]
    assert cluster.home.log_file("decode-0").read_text().count("y" * 99) == 5000


async def test_a_port_in_use_is_named(make_cluster: MakeCluster, journal: Journal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        base = taken.getsockname()[1] - 1  # the router's
        with pytest.raises(
            ConfigError, match=rf"127\.0\.0\.1:{base + 1} \(router --port\).*cluster\.port_base \(now {base}\)"
        ):
            await make_cluster("", f"cluster.port_base={base}").start()
    assert journal.lines("start") == []


def test_settings_do_not_reach_the_services_twice() -> None:
    env = child_env(
        {"SAGELLM_TRANSPORT__BACKEND": "gloo", "SAGELLM_CACHE": "/c", "PATH": "/bin", "PYTHONPATH": "/mine"}
    )
    assert "SAGELLM_TRANSPORT__BACKEND" not in env
    assert (env["SAGELLM_CACHE"], env["PATH"]) == ("/c", "/bin")
    assert env["PYTHONPATH"].endswith(":/mine")


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_services_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    """In a process of its own: a supervisor that is killed cannot clean up."""
    script = f"""
import asyncio, os, sys
from pathlib import Path
from services.cli.process import ServiceProcess
async def main():
    argv = [sys.executable, "-m", "tests.support.fake_service", "prefill"]
    process = await ServiceProcess.start(argv, os.environ, Path({str(tmp_path / "log")!r}))
    await process.ready(20)
    print(process.pid, flush=True)
    await process.wait()
asyncio.run(main())
"""
    env = child_env({**os.environ, "FAKE": "", "FAKE_JOURNAL": str(tmp_path / "journal")})
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        pidfd = os.pidfd_open(pid)
        died = select.poll()
        died.register(pidfd, select.POLLIN)
        supervisor.send_signal(signal.SIGKILL)
        assert died.poll(20_000), "still alive"
        os.close(pidfd)


def test_only_one_supervisor_per_name(tmp_path: Path) -> None:
    home, same, other = (ClusterHome(name, tmp_path) for name in ("a", "a", "b"))
    assert not home.running()
    with home.owned():
        assert same.running()
        with pytest.raises(ConfigError, match=r"cluster 'a' is already running.*sagellm down --name a"), same.owned():
            pytest.fail("two owners")
        with other.owned():
            assert other.running()
    assert not home.running()


def test_a_new_owner_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    home = ClusterHome("a", tmp_path)
    home.log_file("x").parent.mkdir(parents=True)
    home.log_file("x").write_text("old")
    (home.path / "state.json").write_text(json.dumps({"pid": 1}))
    assert home.read() is None, "nobody holds the lock: the file is history"
    with home.owned():
        assert home.read() is None
        assert not home.log_file("x").exists()


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", "."])
def test_a_name_is_one_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.name"):
        ClusterHome(name, tmp_path)
