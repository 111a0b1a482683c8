from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, WorkerIdTaken
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc import worker_main as worker_main_module
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.topology_client import RemoteTopology
from sagellm_common.rpc.worker_main import EXIT_REFUSED, WorkerArgs, make_topology, parse_worker_args, worker_main


@pytest.fixture(autouse=True)
def process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging and tracing belong to the test run here."""
    for name in ("setup_logging", "setup_tracing", "shutdown_tracing"):
        monkeypatch.setattr(worker_main_module, name, lambda *_: None)


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sagellm.yaml"
    file.write_text("engine:\n  num_blocks: 99\n  threads: 2\n")
    monkeypatch.setenv("SAGELLM_ENGINE__THREADS", "3")
    settings = f"--config {file} --set transport.backend=gloo --set engine.block_size_tokens=8"
    argv = f"{settings} --id d7 --port 1 --data-port 2 --metrics-port 3 --router r:4"
    args = parse_worker_args(WorkerRole.DECODE, argv.split())
    assert (args.worker_id, args.port, args.data_port, args.metrics_port, args.router) == ("d7", 1, 2, 3, "r:4")
    engine = args.config.engine
    assert (engine.num_blocks, engine.threads, engine.block_size_tokens) == (99, 3, 8)
    assert args.config.transport.backend == "gloo"


@pytest.mark.parametrize(
    ("role", "blocks"), [(WorkerRole.PREFILL, 32), (WorkerRole.DECODE, 8), (WorkerRole.KV_STORE, 8)]
)
def test_a_roles_own_section_is_over_engine(role: WorkerRole, blocks: int) -> None:
    argv = "--set engine.block_size_tokens=8 --set prefill.block_size_tokens=32 --set decode.threads=2 --router r:1"
    engine = parse_worker_args(role, argv.split()).config.engine
    assert (engine.block_size_tokens, engine.threads) == (blocks, 2 if role is WorkerRole.DECODE else 1)
    assert engine.num_blocks == Config().engine.num_blocks


def test_defaults() -> None:
    args = parse_worker_args(WorkerRole.PREFILL, ["--set", "router.address=r:1"])
    assert args.worker_id == "prefill-0"
    assert (args.port, args.data_port, args.metrics_port) == (0, 0, 0)
    assert args.router == "r:1"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--set no.such=1", "no"),
        ("--set engine.num_blocks=many", "num_blocks"),
        ("--config /no/such/file.yaml", "/no/such/file.yaml"),
        ("--port 70000", "--port 70000"),
        ("--metrics-port -1", "--metrics-port -1"),
        ("--id=", "--id"),
    ],
)
def test_a_bad_argument_is_named_on_stderr(argv: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def never(args: WorkerArgs) -> None:
        raise AssertionError("must not run")

    assert worker_main(WorkerRole.DECODE, never, argv.split()) == EXIT_REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("services.decode: INVALID_CONFIG: ")
    assert named in captured.err
    assert "Traceback" not in captured.err


def test_a_typed_error_while_running_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def taken(args: WorkerArgs) -> None:
        raise WorkerIdTaken("worker id 'decode-0' is taken")

    assert worker_main(WorkerRole.DECODE, taken, []) == EXIT_REFUSED
    assert "WORKER_ID_TAKEN: worker id 'decode-0' is taken" in capsys.readouterr().err


def test_a_worker_that_ends_well_exits_0() -> None:
    async def fine(args: WorkerArgs) -> None:
        return None

    assert worker_main(WorkerRole.DECODE, fine, []) == 0


async def test_the_topology_of_the_config() -> None:
    async with ChannelPool() as channels:
        assert isinstance(make_topology(Config(), "127.0.0.1:1", channels), RemoteTopology)
        with pytest.raises(ConfigError, match="--router"):
            make_topology(Config(), "", channels)
