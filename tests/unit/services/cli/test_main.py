"""The command line as people and scripts meet it: exit codes, what goes to stdout, what to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from sagellm_common.comm_backend.hardware import probe_all
from services.cli import __main__ as cli
from services.cli.cluster import StartFailed
from services.cli.home import ClusterHome, ClusterState
from tests.support.recorded_machines import KUNLUN, NVIDIA


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGELLM_HOME", str(tmp_path))
    return tmp_path


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Sagellm:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *argv: str) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["sagellm", *argv])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = self._capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, " ".join(captured.err.split()))


@pytest.fixture
def sagellm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sagellm:
    return Sagellm(monkeypatch, capsys)


@pytest.mark.parametrize(
    "command", [["status"], ["status", "--json"], ["down"], ["chat", "hi"], ["generate", "x"], ["explain", "r"]]
)
def test_without_a_cluster_every_command_says_so(sagellm: Sagellm, command: list[str]) -> None:
    result = sagellm(*command)
    assert result.code == 3
    assert result.out == ""
    assert "cluster 'local' is not running" in result.err


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["up", "--set", "transprot.backend=tcp"], "transport"),
        (["up", "--set", "transport.backend=pigeon"], "pigeon"),
        (["up", "--set", "model.path=/no/such/model"], "model.path '/no/such/model': no config.json there"),
        (["up", "--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["up", "--name", "../etc", "--set", "model.path=/"], ""),
        (["config", "show", "--set", "x"], "section.key=value"),
        (["up", "--prefill", "0"], "--prefill"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_is_code_2_and_named(sagellm: Sagellm, command: list[str], complaint: str) -> None:
    result = sagellm(*command)
    assert result.code == 2
    assert complaint in result.err
    assert "Traceback" not in result.err


def test_up_refuses_a_name_that_is_running(sagellm: Sagellm, tiny_llama: Path) -> None:
    with ClusterHome("local").owned():
        result = sagellm("up", "--set", f"model.path={tiny_llama}")
    assert result.code == 2
    assert "cluster 'local' is already running" in result.err


def test_a_service_that_does_not_start_is_shown_with_its_last_words(
    sagellm: Sagellm, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def fail(*_: object) -> None:
        raise StartFailed("decode-0", "exited with code 2", ("[out] of memory",), tmp_path / "decode-0.log")

    monkeypatch.setattr(cli.Cluster, "start", fail)
    result = sagellm("up", "--set", f"model.path={tiny_llama}")
    assert result.code == 1
    assert "decode-0 exited with code 2" in result.err
    assert "│ [out] of memory" in result.err


def test_a_router_that_does_not_answer_is_a_failure(sagellm: Sagellm) -> None:
    home = ClusterHome("local")
    with home.owned():
        home.write(ClusterState("local", 1, "/m", router_address="127.0.0.1:1"))
        result = sagellm("status", "--json")
    assert result.code == 1
    assert "PEER_LOST" in result.err


def test_config_show_is_what_config_validate_accepts(sagellm: Sagellm, tmp_path: Path) -> None:
    shown = sagellm("config", "show", "--set", "transport.backend=gloo")
    assert shown.code == 0
    assert yaml.safe_load(shown.out)["transport"]["backend"] == "gloo"
    file = tmp_path / "sagellm.yaml"
    file.write_text(shown.out)
    assert json.loads(sagellm("config", "validate", str(file), "--json").out)["valid"] is True
    as_json = sagellm("config", "show", "--config", str(file), "--json")
    assert json.loads(as_json.out)["transport"]["backend"] == "gloo"


def test_config_schema_describes_every_section(sagellm: Sagellm) -> None:
    schema = json.loads(sagellm("config", "schema").out)
    assert {"cluster", "engine", "transport", "router"} <= schema["properties"].keys()


def test_environment_counts(sagellm: Sagellm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_CLUSTER__NAME", "other")
    assert "cluster 'other'" in sagellm("status").err


def test_devices_of_this_machine(sagellm: Sagellm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "probe_all", lambda: probe_all(NVIDIA))
    printed = sagellm("devices", "--json")
    assert printed.code == 0
    by_kind = {device["kind"]: device for device in json.loads(printed.out)}
    assert list(by_kind) == ["cpu", "cuda", "ascend", "cambricon", "hygon", "kunlun"]
    assert [kind for kind, device in by_kind.items() if device["usable"]] == ["cpu", "cuda"]
    assert by_kind["cuda"]["accelerators"][1]["memory_free_bytes"] == 70012 << 20
    table = sagellm("devices").out.splitlines()
    assert [line.split()[0] for line in table if not line.startswith(" ")][1:] == list(by_kind)
    (first,) = [line for line in table if line.startswith("cuda")]
    assert "✓" in first
    assert "0: NVIDIA H200" in first


def test_a_device_that_is_there_says_what_keeps_it_from_being_used(
    sagellm: Sagellm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "probe_all", lambda: probe_all(KUNLUN))
    printed = " ".join(sagellm("devices").out.split())
    assert "kunlun ✗ 0: Kunlunxin P800 OAM" in printed
    assert "no device_type for Kunlunxin" in printed
