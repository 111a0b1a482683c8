from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = "import services, grpc; grpc.insecure_channel('127.0.0.1:1').close()"


def stderr_of(experiments: str | None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    if experiments is not None:
        env["GRPC_EXPERIMENTS"] = experiments
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("experiments", "known"), [(None, True), ("-no_such_experiment", False)], ids=["ours", "other"]
)
def test_grpc_knows_the_setting_that_services_make(experiments: str | None, known: bool) -> None:
    """Another gRPC may have dropped it and would only log so."""
    assert ("Unknown experiment" not in stderr_of(experiments)) is known
