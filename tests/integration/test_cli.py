"""`sagellm` as a user runs it: real processes, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.cli.cluster import child_env
from services.cli.process import process_runs

TIMEOUT_S = 110


class Sagellm:
    """Runs the command with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.env = {**child_env(), "SAGELLM_HOME": str(home)}

    def __call__(self, *argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.cli", *argv]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *argv: str) -> Any:
        return json.loads(self(*argv, "--json").stdout)


@pytest.fixture(scope="module")
def sagellm(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Any:
    """With a detached cluster running; stopped at the end whatever happened."""
    run = Sagellm(tmp_path_factory.mktemp("home"))
    up = ("up", "--detach", "--prefill=1", "--decode=2", "--set=cluster.port_base=0", f"--set=model.path={tiny_llama}")
    started = run.json(*up)
    pids = [started["pid"], *(process["pid"] for process in started["processes"])]
    yield run
    run("down")
    assert not [pid for pid in pids if process_runs(pid)]
    assert "not running" in run("status", code=3).stderr


def test_status_has_what_scripts_rely_on(sagellm: Sagellm, tiny_llama: Path) -> None:
    status = sagellm.json("status")
    assert status["model_path"] == str(tiny_llama)
    assert status["gateway"]["url"].startswith("http://127.0.0.1:")
    assert ":" in status["router"]["address"]
    assert {w["id"]: w["role"] for w in status["workers"]} == {
        "prefill-0": "prefill",
        "decode-0": "decode",
        "decode-1": "decode",
        "kv-store-0": "kv_store",
    }
    for worker in status["workers"]:
        assert worker["address"]
        assert worker["incarnation"]
        assert process_runs(worker["pid"])
        kv = worker["kv"]
        assert kv["total_blocks"] == kv["free_blocks"] + kv["used_blocks"] + kv["cached_blocks"]
    assert "decode-1" in sagellm("status").stdout


def test_chat_generate_and_explain(sagellm: Sagellm) -> None:
    prompt = "the same prompt gives the same answer"
    generated = sagellm.json("generate", prompt, "--max-tokens=6")
    assert len(generated["token_ids"]) <= 6
    assert generated["summary"]["kv_bytes_transferred"] > 0
    assert sagellm.json("generate", prompt, "--max-tokens=6")["token_ids"] == generated["token_ids"]
    assert sagellm("generate", prompt, "--max-tokens=6").stdout

    explained = sagellm.json("explain", generated["request_id"])
    assert [node["kind"] for node in explained["plan"]["nodes"]][-3:] == ["transfer", "decode", "offload"]
    assert "──► transfer" in sagellm("explain", generated["request_id"]).stdout

    chat = sagellm("chat", "hi", "--max-tokens=4", "--system=be brief")
    assert "TTFT" in chat.stderr
    assert sagellm.json("chat", "hi", "--max-tokens=4")["summary"]["completion_tokens"] >= 1


def test_unknown_request_and_second_up_are_refused(sagellm: Sagellm, tiny_llama: Path) -> None:
    assert "'nope'" in sagellm("explain", "nope", code=1).stderr
    up = ("up", "--detach", "--set=cluster.port_base=0", f"--set=model.path={tiny_llama}")
    assert "already running" in sagellm(*up, code=2).stderr


def test_ctrl_c_stops_a_foreground_cluster(tmp_path: Path, tiny_llama: Path) -> None:
    argv = [sys.executable, "-m", "services.cli", "up", "--json", "--set=cluster.port_base=0"]
    with subprocess.Popen(
        [*argv, f"--set=model.path={tiny_llama}"],
        env=Sagellm(tmp_path).env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as up:
        assert up.stdout is not None
        status = json.loads(up.stdout.readline())
        assert status["ready"] is True
        up.send_signal(signal.SIGINT)
        assert up.wait(TIMEOUT_S) == 0
    assert not [p for p in status["processes"] if process_runs(p["pid"])]


def test_demo_shows_its_work_and_leaves_nothing(tmp_path: Path, smollm2: Path) -> None:
    """The whole way with a real model: OpenAI API, gRPC, a restarted prefill worker, the store."""
    before = {p.pid for p in psutil.Process(os.getpid()).children(recursive=True)}
    demo = Sagellm(tmp_path)("demo")
    assert "Photosynthesis is" in demo.stdout
    assert "served from the store: 32 of 39 prompt tokens" in demo.stdout
    assert "──► transfer" in demo.stdout
    assert demo.stderr == "", "no warnings of libraries"
    mine = f"{tmp_path}/demo/config.yaml"
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if mine in (p.info["cmdline"] or [])]
    assert left == []
    assert {p.pid for p in psutil.Process(os.getpid()).children(recursive=True)} <= before


def test_links_are_measured_and_settings_changed_while_it_runs(sagellm: Any) -> None:
    workers = {"prefill-0", "decode-0", "decode-1"}
    probed = sagellm.json("transport", "probe", "--bytes=65536")
    measured = {(link["source"], link["target"]) for link in probed["links"]}
    assert {(a, b) for a in workers for b in workers if a != b} <= measured
    assert all(link["bytes_per_s"] > 0 and link["backend"] == "tcp" for link in probed["links"])
    assert probed["preset"]["preset"] in ("high-bw", "low-latency", "low-cost")

    sagellm("transport", "set", "chunk_bytes=65536", "transport.fusion=off", "--worker=decode-0")
    shown = sagellm.json("transport", "show")
    settings = {worker["worker_id"]: worker for worker in shown["workers"]}
    assert settings["decode-0"]["changes"] == [["chunk_bytes", "0", "65536"], ["fusion", "auto", "off"]]
    assert settings["decode-1"]["changes"] == []
    assert shown["machine"]["numa"]
    workers = sagellm.json("status")["workers"]
    assert all(worker["indexed"]["credited"] and worker["indexed"]["revision"] > 0 for worker in workers)
    status = {worker["id"]: worker["transport_changes"] for worker in workers}
    assert status["decode-0"][0] == {"key": "chunk_bytes", "loaded": "0", "now": "65536"}
    assert status["prefill-0"] == []
    for wrong, complaint in [("chunk_byte=1", "did you mean chunk_bytes"), ("backend=gloo", "cannot be changed")]:
        assert complaint in sagellm("transport", "set", wrong, code=1).stderr
    sagellm("transport", "set", "nonsense", code=2)


def test_the_eviction_policy_of_a_running_worker(sagellm: Sagellm) -> None:
    sagellm("kv", "policy", "set", "s3-fifo", "--worker=decode-0")
    policies = {worker["worker_id"]: worker["policy"] for worker in sagellm.json("kv", "policy", "show")["workers"]}
    store = next(name for name in policies if "store" in name)
    assert policies == {"prefill-0": "adaptive", "decode-0": "s3-fifo", "decode-1": "adaptive", store: "adaptive"}
    assert "unknown eviction policy 'oldest'" in sagellm("kv", "policy", "set", "oldest", code=1).stderr
    assert sagellm("generate", "The", "--max-tokens=4").stdout
