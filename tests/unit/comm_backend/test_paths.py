"""Which byte path a pull takes, and what happens when it fails."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import REGISTRY

from sagellm_common.comm_backend import AUTO, OverlapRule, backends, make_channel
from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.fusion import MessagePlanner
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.links import LinkTable
from sagellm_common.comm_backend.paths import AVOID_S, OpenPath, PathsChannel
from sagellm_common.comm_backend.protocol import Encoding, Pull, PullAlong, TransferResult
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError, InvalidRequest, KvCorrupt, LeaseExpired, PeerLost
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import BlockIds, DataPath, KvSource
from tests.support.kv_channels import HOST, blocks_of, random_region
from tests.support.recorded_machines import RecordedHost

IDS = np.array([1, 2], dtype=np.int32)
FAST_S = 2.0


@dataclass
class FakeChannel:
    """Notes its pulls; fails with `error` after `takes_s` of the clock's time."""

    name: str
    clock: ManualClock
    pulls_along: bool = True
    encodes: bool = True
    error: Exception | None = None
    takes_s: float = 0.0
    start_error: Exception | None = None
    pulls: list[tuple[KvSource, float]] = field(default_factory=list)
    brings: tuple[int, ...] = ()
    closed: bool = False

    @property
    def address(self) -> str:
        return f"{self.name}:1"

    async def start(self) -> str:
        if self.start_error is not None:
            raise self.start_error
        return self.address

    async def pull(self, asked: Pull) -> TransferResult:
        return self._pulled(asked)

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        for num_bytes in self.brings:
            asked.on_bytes(num_bytes)
        return self._pulled(asked)

    def _pulled(self, asked: Pull | PullAlong) -> TransferResult:
        self.pulls.append((asked.source, asked.timeout_s))
        self.clock.advance(self.takes_s)
        if self.error is not None:
            raise self.error
        return TransferResult(128, 0.5, len(asked.target_blocks))

    async def serve_pull(self, transfer_id: str, epoch: int, block_ids: BlockIds, pair_id: str) -> bytes:
        return self.name.encode()

    async def close(self) -> None:
        self.closed = True


class Worker:
    """A receiver with `shm` (to those on host `here`), `rdma` and `tcp`."""

    def __init__(self, **settings: object) -> None:
        self.clock = ManualClock()
        self.shm, self.rdma, self.tcp = (FakeChannel(name, self.clock) for name in ("shm", "rdma", "tcp"))
        self.rdma.pulls_along = self.shm.encodes = False
        paths = [OpenPath("shm", self.shm, "here", "both on one host"), OpenPath("rdma", self.rdma, "", "RDMA")]
        paths.append(OpenPath("tcp", self.tcp, "", "reaches everybody"))
        live, links = KVTransportConfig(TransportConfig.model_validate(settings)), LinkTable()
        self.channel = PathsChannel(
            paths, live, links, MessagePlanner(live, links), fast_s=FAST_S, now_s=self.clock.now
        )

    @property
    def used(self) -> list[str]:
        return [channel.name for channel in (self.shm, self.rdma, self.tcp) for _ in channel.pulls]

    async def pull(self, source: KvSource, timeout_s: float = 10.0) -> TransferResult:
        return await self.channel.pull(Pull(source, IDS, IDS, timeout_s=timeout_s))


def a_source(*paths: str, host: str = "here", worker_id: str = "w") -> KvSource:
    known = {"shm": DataPath("shm", "shm:9", host), "rdma": DataPath("rdma", "rdma:9"), "tcp": DataPath("tcp", "tcp:9")}
    return KvSource(
        "t", 1, worker_id, "i", "c", "tcp:9", "tcp", IDS, 8, 1000, paths=tuple(known[name] for name in paths)
    )


def fallbacks(failed: str, used: str) -> float:
    return REGISTRY.get_sample_value("sagellm_comm_path_fallbacks_total", {"failed": failed, "used": used}) or 0.0


@pytest.mark.parametrize(
    ("source", "backend", "why"),
    [
        (a_source("shm", "rdma", "tcp"), "shm", "both on one host"),
        (a_source("shm", "rdma", "tcp", host="elsewhere"), "rdma", "RDMA"),
        (a_source("shm", "tcp", host="elsewhere"), "tcp", "reaches everybody"),
        (a_source("tcp"), "tcp", "reaches everybody"),
        (a_source(), "tcp", "reaches everybody"),
    ],
    ids=["same-host", "rdma-on-both", "no-rdma-there", "tcp-only", "says-no-paths"],
)
async def test_the_best_path_that_both_have(
    source: KvSource, backend: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker()
    with caplog.at_level(logging.INFO):
        result = await worker.pull(source)
        await worker.pull(source)
    assert (result.backend, result.why) == (backend, why)
    assert worker.used == [backend] * 2
    pulled, _ = getattr(worker, backend).pulls[0]
    assert (pulled.backend, pulled.data_address) == (backend, f"{backend}:9")
    assert caplog.text.count(f"KV of w is pulled over {backend}: {why}") == 1


async def test_what_two_have_in_common_may_be_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'w' sends KV over gloo, and this one receives it over shm, rdma, tcp"):
        await Worker().pull(replace(a_source(), backend="gloo"))


async def test_a_path_that_fails_at_once_is_replaced_and_said(caplog: pytest.LogCaptureFixture) -> None:
    worker, before = Worker(), fallbacks("shm", "rdma")
    worker.shm.error, worker.shm.takes_s = PeerLost("no such file"), 1.0
    with caplog.at_level(logging.WARNING):
        result = await worker.pull(a_source("shm", "rdma", "tcp"))
    assert (result.backend, result.why) == ("rdma", "RDMA; shm failed")
    assert worker.rdma.pulls[0][1] == 9.0, "the deadline is one for all of them"
    assert "KV of w: shm failed, trying rdma: no such file" in caplog.text
    assert fallbacks("shm", "rdma") == before + 1


async def test_a_failed_path_is_left_alone_for_a_while() -> None:
    worker = Worker()
    worker.shm.error = PeerLost("gone")
    await worker.pull(a_source("shm", "tcp"))
    await worker.pull(a_source("shm", "tcp"))
    assert worker.used == ["shm", "tcp", "tcp"]
    await worker.pull(a_source("shm", "tcp", worker_id="another"))
    assert worker.used == ["shm", "shm", "tcp", "tcp", "tcp"]
    worker.clock.advance(AVOID_S + 1)
    worker.shm.error = None
    assert (await worker.pull(a_source("shm", "tcp"))).backend == "shm"


@pytest.mark.parametrize("error", [LeaseExpired("late"), KvCorrupt("bad")])
async def test_what_is_no_fault_of_the_path_is_raised(error: Exception) -> None:
    worker = Worker()
    worker.shm.error = error
    with pytest.raises(type(error)):
        await worker.pull(a_source("shm", "tcp"))
    assert worker.used == ["shm"]


async def test_a_peer_that_fell_silent_is_not_asked_again_over_another_path() -> None:
    worker = Worker()
    worker.shm.error, worker.shm.takes_s = PeerLost("silent"), FAST_S + 1
    with pytest.raises(PeerLost, match="silent"):
        await worker.pull(a_source("shm", "tcp"))
    assert worker.used == ["shm"]


async def test_when_all_fail_the_last_error_is_raised() -> None:
    worker = Worker()
    worker.shm.error, worker.tcp.error = PeerLost("first"), PeerLost("last")
    with pytest.raises(PeerLost, match="last"):
        await worker.pull(a_source("shm", "tcp"))


async def test_along_goes_over_a_path_that_can_and_tells_bytes_once() -> None:
    worker, told = Worker(), list[int]()
    worker.shm.error, worker.shm.brings = PeerLost("half-way"), (10, 10)
    worker.tcp.brings = (8, 8, 24)
    result = await worker.channel.pull_along(
        PullAlong(a_source("shm", "rdma", "tcp"), 0, IDS, timeout_s=10.0, on_bytes=told.append)
    )
    assert (result.backend, worker.used) == ("tcp", ["shm", "tcp"])
    assert sum(told) == 40
    with pytest.raises(InvalidRequest, match="over rdma nothing is pulled along"):
        await worker.channel.pull_along(PullAlong(a_source("rdma"), 0, IDS, timeout_s=10.0, on_bytes=told.append))


async def test_what_the_source_converts_goes_over_a_path_that_can() -> None:
    worker = Worker()
    encoding = Encoding("int8", 16, 4)
    result = await worker.channel.pull(Pull(a_source("shm", "tcp"), IDS, IDS, timeout_s=10.0, encoding=encoding))
    assert (result.backend, worker.used) == ("tcp", ["tcp"])
    with pytest.raises(InvalidRequest, match="over shm nothing is converted"):
        await worker.channel.pull(Pull(a_source("shm"), IDS, IDS, timeout_s=10.0, encoding=encoding))


def test_the_speed_of_a_link_is_measured_or_as_configured() -> None:
    worker = Worker(link_bytes_per_s=77)
    assert worker.channel.bytes_per_s(a_source("tcp")) == 77
    worker.channel.links.observe("w", "tcp", 1 << 20, 1.0)
    assert worker.channel.bytes_per_s(a_source("tcp")) == 1 << 20


async def test_links_learn_from_transfers() -> None:
    worker = Worker()
    await worker.pull(a_source("shm", "tcp"))
    known = worker.channel.links.find("w", "shm")
    assert known is not None
    assert (known.samples, known.latency_s) == (1, pytest.approx(0.5, rel=1e-3))
    assert worker.channel.links.find("w", "tcp") is None


async def test_what_is_converted_on_its_way_teaches_nothing_of_the_link() -> None:
    worker = Worker()
    await worker.channel.pull(Pull(a_source("tcp"), IDS, IDS, timeout_s=10.0, encoding=Encoding("int8", 16, 4)))
    assert worker.channel.links.all() == []


async def test_a_path_that_does_not_start_is_left_out() -> None:
    worker = Worker()
    worker.shm.start_error = ConfigError("no memfd")
    assert await worker.channel.start() == "tcp:1"
    assert [path.backend for path in worker.channel.paths] == ["rdma", "tcp"]
    worker.tcp.start_error = ConfigError("port in use")
    with pytest.raises(ConfigError, match="port in use"):
        await worker.channel.start()
    await worker.channel.close()
    assert worker.rdma.closed and worker.tcp.closed


async def test_a_peers_call_is_served_by_the_path_it_names() -> None:
    channel = Worker().channel
    assert await channel.serving("rdma").serve_pull("t", 1, IDS, "p") == b"rdma"
    assert await channel.serving("").serve_pull("t", 1, IDS, "p") == b"tcp"
    with pytest.raises(InvalidRequest, match="backend is 'nccl', but KV is served over shm, rdma, tcp"):
        channel.serving("nccl")


# ---- make_channel ----


def open_fake(name: str, error: Exception | None = None) -> SimpleNamespace:
    def open_channel(end: object) -> FakeChannel:
        if error is not None:
            raise error
        return FakeChannel(name, ManualClock())

    return SimpleNamespace(open_channel=open_channel)


@pytest.mark.parametrize(
    ("machine", "errors", "offered"),
    [
        (RecordedHost(), {}, []),
        (RecordedHost(files={"/proc/sys/kernel/random/boot_id": "b\n"}), {}, ["shm"]),
        (
            RecordedHost(
                files={
                    "/proc/sys/kernel/random/boot_id": "b\n",
                    "/sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
                }
            ),
            {"shm": ConfigError("no pool in a memfd")},
            ["rdma"],
        ),
        (RecordedHost(files={"/sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN\n"}), {}, []),
    ],
    ids=["nothing", "same-host", "rdma", "rdma-down"],
)
async def test_auto_offers_what_works_here(
    machine: RecordedHost,
    errors: dict[str, Exception],
    offered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in (candidate.backend for candidate in AUTO):
        monkeypatch.setitem(backends.MODULES, name, f"fake.{name}")
        monkeypatch.setitem(__import__("sys").modules, f"fake.{name}", open_fake(name, errors.get(name)))
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    with caplog.at_level(logging.INFO):
        channel = make_channel(TransportConfig(backend="auto"), random_region(4, 64), leases, HOST, 0, machine=machine)
    assert [*channel.by_backend] == [*offered, "tcp"]
    assert f"auto offers {', '.join([*offered, 'tcp'])}" in caplog.text
    for name, error in errors.items():
        assert f"does not offer {name}: {error}" in caplog.text
    await channel.close()


async def test_auto_and_tcp_understand_each_other() -> None:
    """The real byte path: one worker with several paths to offer, one that knows only tcp."""
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    regions = [random_region(8, 64, seed) for seed in range(2)]
    auto = make_channel(TransportConfig(backend="auto"), regions[0], leases, HOST, 0, machine=RecordedHost())
    plain = make_channel(TransportConfig(backend="tcp"), regions[1], leases, HOST, 0)
    leases.pin("t", 1, Allocation(IDS), 0)
    try:
        for source, target, into in ((auto, plain, 1), (plain, auto, 0)):
            address = await source.start()
            pulled = KvSource("t", 1, "w", "i", "c", address, source.name, IDS, 0, 1000, paths=source.paths)
            result = await target.pull(Pull(pulled, IDS, IDS, timeout_s=10))
            assert result.backend == "tcp"
            assert blocks_of(regions[into], IDS) == blocks_of(regions[1 - into], IDS)
    finally:
        await auto.close()
        await plain.close()


# ---- overlap ----


@pytest.mark.parametrize(
    ("settings", "num_bytes", "planned", "worth"),
    [
        ({"overlap": "off"}, 1 << 30, True, False),
        ({}, 1 << 30, None, True),
        ({}, 1 << 20, None, False),
        ({}, 1 << 20, True, True),
        ({}, 1 << 30, False, False),
        ({"overlap_min_bytes": 100}, 100, False, True),
        ({"overlap_min_bytes": 100}, 99, True, False),
    ],
)
def test_who_decides_on_overlap(settings: dict[str, object], num_bytes: int, planned: bool | None, worth: bool) -> None:
    assert OverlapRule(Worker(**settings).channel).worth(num_bytes, planned) == worth
