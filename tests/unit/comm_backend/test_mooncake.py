"""What keeps late bytes of Mooncake's engine out of KV blocks, and what is said where it cannot work."""

from __future__ import annotations

import builtins
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.comm_backend.backends import End, load, mooncake_engine
from sagellm_common.comm_backend.backends.mooncake_engine import MAX_READS, SLOT_BYTES, Engine
from sagellm_common.comm_backend.backends.mooncake_receiver import cut_in_groups, runs
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError, KvExhausted, PeerLost
from tests.support.kv_channels import HOST, random_region

GOES_ON, DONE, FAILED, LATE = 0, 1, -1, -2


class FakeEngine:
    """Says of each read what the test wants it to."""

    def __init__(self) -> None:
        self.said = GOES_ON
        self.batches = 0

    def get_rpc_port(self) -> int:
        return 1

    def register_memory(self, address: int, num_bytes: int) -> int:
        return 0

    def batch_transfer_async_read(self, peer: str, to: list[int], at: list[int], lengths: list[int]) -> int:
        self.batches += 1
        return self.batches

    def transfer_check_status(self, batch: int) -> int:
        return self.said


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(mooncake_engine, "_started", lambda protocol, host: fake)
    return fake


def read(engine: Engine, timeout_s: float = 5.0, stop: threading.Event | None = None) -> set[int]:
    """The addresses of the slots it had."""
    with engine.slots(1) as slots:
        addresses = {slot.address for slot in slots}
        deadline_s = time.monotonic() + timeout_s
        with engine.reading("peer", [(0, 10), (20, 10)], slots[0], deadline_s, stop or threading.Event()):
            pass
    return addresses


def test_slots_are_used_again(fake: FakeEngine) -> None:
    fake.said = DONE
    engine = Engine("tcp", HOST)
    assert read(engine) == read(engine)


@pytest.mark.parametrize("said", [GOES_ON, LATE])
def test_a_slot_is_kept_aside_until_its_reads_have_ended(fake: FakeEngine, said: int) -> None:
    engine = Engine("tcp", HOST)
    fake.said = said
    stop = threading.Event()
    stop.set()
    with engine.slots(1) as (slot, _), pytest.raises(TimeoutError):
        late = slot.address
        with engine.reading("peer", [(0, 10), (20, 10)], slot, time.monotonic() + 5, stop):
            pass
    with engine.slots(1) as slots:
        assert late not in {slot.address for slot in slots}
    fake.said = DONE
    with engine.slots(1) as one, engine.slots(1) as other:
        assert late in {slot.address for slot in (*one, *other)}


def test_a_read_ends_at_its_deadline(fake: FakeEngine) -> None:
    with pytest.raises(TimeoutError):
        read(Engine("tcp", HOST), timeout_s=0.0)


def test_an_engine_that_does_not_take_reads_is_left_behind(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it first wants to hear from a peer that has stopped."""
    engine, go_on = Engine("tcp", HOST), threading.Event()
    take = fake.batch_transfer_async_read

    def taking(*args: Any) -> int:
        assert go_on.wait(20)
        return take(*args)

    monkeypatch.setattr(fake, "batch_transfer_async_read", taking)
    with engine.slots(1) as (slot, _), pytest.raises(TimeoutError, match="takes no reads"):
        late = slot.address
        with engine.reading("peer", [(0, 10)], slot, time.monotonic(), threading.Event()):
            pass
    with engine.slots(1) as slots:
        assert late not in {slot.address for slot in slots}, "it may still be read into"
    fake.said = DONE
    go_on.set()
    assert read(engine)


def test_a_read_that_fails_is_a_lost_peer_and_frees_its_turn(fake: FakeEngine) -> None:
    engine = Engine("tcp", HOST)
    fake.said = FAILED
    with pytest.raises(PeerLost):
        read(engine)
    fake.said = DONE
    read(engine)


def test_slots_kept_aside_do_not_grow_without_bound(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_engine, "MAX_SLOTS", 4)
    engine = Engine("tcp", HOST)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            read(engine, timeout_s=0.0)
    with pytest.raises(KvExhausted, match="3 of them by reads"):
        read(engine)
    fake.said = DONE
    read(engine)


@pytest.mark.parametrize("size", [1, 16 << 10, SLOT_BYTES, SLOT_BYTES + 1])
@pytest.mark.parametrize("ids", [[3], [0, 1, 2, 9], list(range(0, 4000, 2)), list(range(3000))])
def test_groups_cover_the_blocks_in_order(size: int, ids: list[int]) -> None:
    groups = list(cut_in_groups(runs(1 << 40, np.array(ids, dtype=np.int32), size), size))
    pieces = [(at, n) for group in groups for at, n in group]
    assert [at + k for at, n in pieces for k in range(0, n, size)] == [(1 << 40) + b * size for b in ids]
    for group in groups:
        assert len(group) <= MAX_READS and sum(n for _, n in group) <= max(SLOT_BYTES, size)


def an_end(backend: str) -> End:
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    region = random_region(4, 64)
    config = TransportConfig(backend=backend)  # type: ignore[arg-type]
    return End(config, region, leases, HOST, 0)


def test_rdma_names_what_it_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rdma = load("rdma")
    for devices in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(rdma, "DEVICES", devices)
        with pytest.raises(ConfigError, match=f"no RDMA device in {devices}; load .* 'mooncake'"):
            rdma.open_channel(an_end("rdma"))


@pytest.mark.parametrize(
    ("error", "fix"),
    [(ModuleNotFoundError("no mooncake"), "make setup"), (ImportError("libibverbs"), "make system-deps")],
)
def test_an_engine_that_cannot_be_loaded_names_the_fix(
    error: ImportError, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def importing(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("mooncake"):
            raise error
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(mooncake_engine, "_idle", [])
    with pytest.raises(ConfigError, match=fix):
        load("mooncake").open_channel(an_end("mooncake"))
