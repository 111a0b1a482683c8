"""A cluster of processes started as the rendered containers say; each pod has an address of 127.0.0.0/8."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from helm.check import CHART
from sagellm_common.client import Client
from sagellm_common.core.ports import SagePorts
from tests.support.chart import Release, arguments, container_of, environment

START_S = 90.0
END_S = 30.0
ROUTER = "demo-sagellm-router.llm.svc"
POD_IPS = {"router": "127.0.0.1", "prefill": "127.20.0.2", "decode": "127.20.0.3", "kv-store": "127.20.0.4"}
POD_IPS["gateway"] = POD_IPS["router"]  # both bind all addresses


@dataclass
class Pods:
    release: Release
    config: Path
    ports: SagePorts
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    env: dict[str, dict[str, str]] = field(default_factory=dict)

    def start(self, part: str) -> None:
        container = container_of(self.release.workload(part))
        env = {n: v for n, v in os.environ.items() if not n.startswith("SAGELLM_") or n == "SAGELLM_CACHE"}
        env |= environment(container, f"demo-{part}-0", POD_IPS[part], {})
        env["HOME"] = os.environ["HOME"]  # compiled kernels, which the image keeps elsewhere
        argv = [sys.executable, *container["command"][1:], *arguments(container, env, self.config)]
        log = self.config.with_name(f"{part}.log").open("w")
        self.env[part] = env
        self.running[part] = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        log.close()

    def ready(self, part: str) -> dict[str, Any]:
        """Its ready line."""
        process = self.running[part]
        assert process.stdout is not None
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, self.config.with_name(f"{part}.log").read_text()
        return json.loads(line)  # type: ignore[no-any-return]

    def pre_stop(self, part: str) -> subprocess.CompletedProcess[str]:
        """What kubelet runs before it sends SIGTERM."""
        hook = container_of(self.release.workload(part))["lifecycle"]["preStop"]["exec"]["command"]
        return self.script(hook[1:], self.env[part])

    def script(self, argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """One of the chart's own, as mounted at /etc/sagellm."""
        command = [sys.executable, str(CHART / "files" / Path(argv[0]).name), *argv[1:]]
        env = env | {"PYTHONPATH": str(CHART.parent.parent)}  # the image has sageLLM installed
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_S)

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait(END_S)
            if process.stdout:
                process.stdout.close()


def _free_base() -> int:
    """With the ports free that the router and the gateway bind on all addresses."""
    for _ in range(50):
        ports = SagePorts(random.randrange(20000, 30000))
        with ExitStack() as held:
            try:
                for port in (ports.gateway, ports.router, ports.session(0), ports.metrics(0)):
                    held.enter_context(socket.create_server(("0.0.0.0", port)))
            except OSError:
                continue
            return ports.base
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def pods(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux: each pod has an address of 127.0.0.0/8")
    base = _free_base()
    settings = f"model.path={tiny_llama},portBase={base},config.engine.weights=dtype,config.engine.threads=1"
    drain = "prefill.drainSeconds=20,decode.drainSeconds=20"
    release = Release.of(CHART / "ci" / "1p1d-cpu-values.yaml", "--set", f"{settings},{drain}")
    config = tmp_path_factory.mktemp("etc") / "config.yaml"
    config.write_text(release.config_text().replace(ROUTER, POD_IPS["router"]))  # what DNS would do
    pods = Pods(release, config, SagePorts(base))
    try:
        for part in release.workloads():
            pods.start(part)  # all at once and in any order, as Kubernetes does
        yield pods
    finally:
        pods.stop()


def test_the_chart_serves_generates_and_drains(pods: Pods) -> None:
    ready = {part: pods.ready(part) for part in pods.running}
    ports, decode = pods.ports, POD_IPS["decode"]
    assert ready["decode"]["address"] == f"{decode}:{ports.worker(0)}"
    assert ready["decode"]["data_address"].endswith(f"{decode}:{ports.worker_data(0)}")
    assert ready["decode"]["id"] == "demo-decode-0"

    (test,) = pods.release.kind("Pod")
    (container,) = test["spec"]["containers"]
    gateway = f"--url=http://{POD_IPS['gateway']}:{ports.gateway}"
    generated = pods.script([container["command"][-1], gateway, "--timeout-s=60"], dict(os.environ))
    assert generated.returncode == 0, generated.stderr
    assert "demo-prefill-0" in generated.stdout and "demo-decode-0" in generated.stdout

    with Client(f"{POD_IPS['router']}:{ports.router}") as client:
        # What runs when the hook begins is finished, and only then does the process end.
        outputs = client.generate([5] * 40, max_tokens=1200, ignore_eos=True)
        tokens = len(next(outputs).token_ids)
        hook = pods.pre_stop("decode")
        tokens += sum(len(output.token_ids) for output in outputs)
    assert (hook.returncode, hook.stdout) == (0, "drained, 0 requests unfinished\n"), hook.stderr
    assert tokens == 1200
    assert pods.running["decode"].wait(END_S) == 0

    gone = pods.pre_stop("decode")
    assert gone.returncode == 1 and "UNAVAILABLE" in gone.stderr


# ---- the script of `helm test`, beside a gateway that fails ----


@pytest.mark.parametrize(
    ("status", "answer", "code", "told"),
    [
        (200, {"choices": [{"text": ""}], "usage": {"completion_tokens": 0}}, 1, "0 tokens"),
        (401, {"error": {"message": "missing or unknown API key"}}, 1, "unknown API key"),
    ],
)
def test_generate_fails_when_nothing_is_generated(status: int, answer: Any, code: int, told: str) -> None:
    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(status, {"data": [{"id": "m"}]} if status == 200 else answer)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._answer(status, answer)

        def _answer(self, status: int, document: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            script = [sys.executable, str(CHART / "files" / "generate.py")]
            url = f"--url=http://127.0.0.1:{server.server_port}"
            done = subprocess.run([*script, url, "--timeout-s=5"], capture_output=True, text=True, timeout=60)
        finally:
            server.shutdown()
            serving.join()
    assert done.returncode == code
    assert told in done.stdout + done.stderr
