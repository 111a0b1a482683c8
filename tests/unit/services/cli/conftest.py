from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from sagellm_common.core.config_loader import load_config
from services.cli.cluster import Cluster, Member
from services.cli.home import ClusterHome


class Journal:
    """What the fake services noted: "start decode-0", "stop router"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, what: str) -> list[str]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [line.removeprefix(f"{what} ") for line in lines if line.startswith(f"{what} ")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


MakeCluster = Callable[..., Cluster]


@pytest.fixture
async def make_cluster(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeCluster]:
    """Makes clusters of fake services: `make_cluster("decode-0=fail", num_decode=2)`. They are stopped afterwards."""
    argv = Cluster._argv

    def fake_argv(self: Cluster, member: Member) -> list[str]:
        flags = argv(self, member)[3:]
        return [sys.executable, "-m", "tests.support.fake_service", member.role, *flags]

    monkeypatch.setattr(Cluster, "_argv", fake_argv)
    monkeypatch.setenv("FAKE_JOURNAL", str(journal.path))
    async with AsyncExitStack() as stack:

        def make(behaviour: str = "", *settings: str, **arguments: Any) -> Cluster:
            monkeypatch.setenv("FAKE", behaviour)
            config = load_config(None, {}, ["cluster.port_base=0", *settings])
            home = ClusterHome("test", tmp_path / "home")
            stack.enter_context(home.owned())
            cluster = Cluster(config, home, **arguments)
            stack.push_async_callback(cluster.stop)
            return cluster

        yield make
