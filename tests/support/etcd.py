"""Real etcd for tests: one node or three, on loopback, killed and restarted at will."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ETCD = shutil.which("etcd")

START_TIMEOUT_S = 30.0
PORT_ATTEMPTS = 3


@dataclass
class EtcdNode:
    name: str
    data_dir: Path
    client_port: int
    peer_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"


@dataclass
class EtcdCluster:
    """Its methods block: from a coroutine, call them through `asyncio.to_thread`."""

    nodes: list[EtcdNode] = field(default_factory=list)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(node.endpoint for node in self.nodes)

    def start(self, *indices: int) -> None:
        """Starts these nodes (all, if none are named), again after a kill, and waits until each serves."""
        chosen = [self.nodes[i] for i in indices] or self.nodes
        for node in chosen:
            self._launch(node)
        deadline = time.monotonic() + START_TIMEOUT_S
        for node in chosen:
            while not self._healthy(node):
                assert node.process is not None
                if node.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{node.name} did not start:\n{(node.data_dir / 'log').read_text()[-4000:]}")
                time.sleep(0.05)

    def kill(self, *indices: int) -> None:
        """SIGKILL for these nodes (all, if none are named)."""
        for node in [self.nodes[i] for i in indices] or self.nodes:
            if node.process is not None:
                node.process.kill()
                node.process.wait()
                node.process = None

    def leader(self) -> int:
        """The leader's index, once the living nodes have one."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for index, node in enumerate(self.nodes):
                if node.process is None:
                    continue
                try:
                    status = self.post(index, "maintenance/status", {})
                except OSError:
                    continue
                if status.get("leader") == status["header"]["member_id"]:
                    return index
            time.sleep(0.05)
        raise RuntimeError("etcd elected no leader")

    def post(self, index: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A call to etcd's JSON API, keys and values in base64. Raises OSError."""
        request = urllib.request.Request(
            f"http://{self.nodes[index].endpoint}/v3/{path}", json.dumps(body).encode(), method="POST"
        )
        with _direct.open(request, timeout=2) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def _launch(self, node: EtcdNode) -> None:
        assert ETCD is not None and node.process is None
        members = ",".join(f"{n.name}=http://127.0.0.1:{n.peer_port}" for n in self.nodes)
        with (node.data_dir / "log").open("ab") as log:
            node.process = subprocess.Popen(
                [
                    ETCD,
                    f"--name={node.name}",
                    f"--data-dir={node.data_dir / 'data'}",
                    f"--listen-client-urls=http://{node.endpoint}",
                    f"--advertise-client-urls=http://{node.endpoint}",
                    f"--listen-peer-urls=http://127.0.0.1:{node.peer_port}",
                    f"--initial-advertise-peer-urls=http://127.0.0.1:{node.peer_port}",
                    f"--initial-cluster={members}",
                    "--logger=zap",
                ],
                stdout=log,
                stderr=log,
            )

    def _healthy(self, node: EtcdNode) -> bool:
        try:
            with _direct.open(f"http://{node.endpoint}/health", timeout=2) as answer:
                return bool(json.load(answer).get("health") == "true")
        except (OSError, ValueError):
            return False


# The environment's HTTP proxy is not for loopback.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def etcd_cluster(directory: Path, size: int = 1) -> Iterator[EtcdCluster]:
    """A running cluster of `size` nodes with their data below `directory`; skips the test where etcd is missing."""
    if ETCD is None:
        pytest.skip("etcd is not installed: apt-get install etcd-server (make system-deps)")
    cluster = _started(directory, size)
    try:
        yield cluster
    finally:
        cluster.kill()


def _started(directory: Path, size: int) -> EtcdCluster:
    """On ports that nobody took between our choice and etcd's bind: else on others."""
    for attempt in itertools.count():
        ports = _free_ports(2 * size)
        cluster = EtcdCluster()
        for index in range(size):
            data_dir = directory / f"etcd-{index}-{attempt}"
            data_dir.mkdir(parents=True)
            cluster.nodes.append(EtcdNode(f"node{index}", data_dir, ports[2 * index], ports[2 * index + 1]))
        try:
            cluster.start()
        except BaseException as err:
            cluster.kill()
            if "address already in use" not in str(err) or attempt == PORT_ATTEMPTS:
                raise
        else:
            return cluster
    raise AssertionError("not reached")


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different: etcd must know its peers' before it starts."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
