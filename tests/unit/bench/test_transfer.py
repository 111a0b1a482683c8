"""`sagellm bench transfer`: a small run between two real processes, and how it judges."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import services
from bench.benchmarks.transfer.__main__ import backends, sizes
from bench.benchmarks.transfer.measure import KIB, MIB, Measured, Preset, Samples, measure
from bench.benchmarks.transfer.report import save, targets
from sagellm_common.core.errors import ConfigError
from services.cli import benchmarks

SMALL = Preset((256 * KIB,), (16 * KIB,), 0, 2, 1)


async def test_byte_paths_and_peers_bring_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.benchmarks.transfer.measure.MIN_POOL_BYTES", 1 * MIB)
    monkeypatch.setattr("bench.benchmarks.transfer.measure.FAILING_BYTES", 1 * MIB)
    monkeypatch.setattr("bench.benchmarks.transfer.measure.STOPPED_S", 0.05)
    monkeypatch.setattr("bench.benchmarks.transfer.measure.FAILING", ("tcp",))
    found = await measure(("tcp", "gloo"), SMALL, lambda _: None)
    (cell,) = found.cells.values()
    assert {"memcpy", "tcp", "tcp, no digest", "gloo", "gloo, no digest", "plain gloo"} <= cell.keys()
    assert "plain mooncake" in cell.keys() | found.missing.keys()
    for samples in cell.values():
        assert len(samples.seconds) == len(samples.cpu_s) == 3
        assert min(samples.cpu_s) > 0
    assert {len(seconds) for seconds in found.ack_s.values()} == {2}
    assert "plain tcp" in found.ack_s
    assert found.dead_s.keys() | found.late_s.keys() <= {"tcp"}
    written = save(found, {"cores": 2}, tmp_path / "transfer.json")
    assert all(path.stat().st_size for path in written)
    assert {row["path"] for row in json.loads(written[0].read_text())["rows"]} == cell.keys()


def test_a_target_is_judged_by_rounds_side_by_side() -> None:
    """The machine was twice as slow in the second round: no median of either alone would tell."""
    cell = {
        "tcp": Samples([1.0, 2.0, 1.0], [1.0] * 3, [1.0]),
        "tcp, no digest": Samples([1.0, 2.0, 1.0], [1.0] * 3, [1.0]),
        "plain gloo": Samples([2.9, 8.0, 3.5], [1.0] * 3, [1.0]),
    }
    found = Measured(cells={(128 * MIB, 16 * KIB): cell}, ack_s={"tcp": [50e-6]}, dead_s={"tcp": [1e-3, 2e-3]})
    verdicts = {target.what: (round(target.measured, 2), target.met) for target in targets(found)}
    assert verdicts == {
        "tcp over plain gloo, blocks of 16 KiB": (3.5, True),
        "tcp, a dead source noticed after, ms": (2.0, True),
        "tcp, 16 KiB to the ack, µs": (50.0, False),
        "tcp, digest on over off, blocks of 16 KiB": (1.0, True),
    }


def test_arguments_say_what_is_wrong() -> None:
    assert sizes("16K,2M") == (16 * KIB, 2 * MIB)
    with pytest.raises(argparse.ArgumentTypeError, match="'16' is no size"):
        sizes("1M,16")
    with pytest.raises(argparse.ArgumentTypeError, match="unknown byte path smoke; known: .*tcp"):
        backends("tcp,smoke")


def test_the_command_says_what_to_do_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'': unknown benchmark; known: autoscale .*, index .*, kv .*, transfer"):
        benchmarks.run("", [])
    monkeypatch.setattr(services, "__path__", [str(tmp_path / "services")])
    with pytest.raises(ConfigError, match="from a checkout"):
        benchmarks.run("transfer", [])
