"""The index by the words of its contract, compiled and in Python."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import Tier
from sagellm_common.prefix_reuse import holder_table, native
from sagellm_common.prefix_reuse.holder_table import HolderTable, NativeTable, PythonTable
from sagellm_common.prefix_reuse.index import PrefixReuseIndex

A, B, C, D = (bytes([i]) * 16 for i in range(4))

MakeIndex = Callable[..., PrefixReuseIndex]


def compiled(max_blocks: int) -> HolderTable:
    library = native.library()
    if library is None:
        pytest.skip("needs the compiled index: python -m sagellm_common.prefix_reuse.native")
    return NativeTable(library, max_blocks)


def python(max_blocks: int) -> HolderTable:
    return PythonTable(max_blocks, threading.Lock())


@pytest.fixture(params=[compiled, python])
def make_index(request: pytest.FixtureRequest) -> MakeIndex:
    return lambda max_blocks=1 << 20: PrefixReuseIndex(table=request.param(max_blocks))


def chain(seed: int, blocks: int) -> bytes:
    return np.random.default_rng(seed).bytes(16 * blocks)


def longest(index: PrefixReuseIndex, hashes: bytes) -> dict[str, int]:
    return {worker: depths[-1] for worker, depths in index.lookup(hashes).items()}


def test_each_worker_has_its_own_longest_prefix(make_index: MakeIndex) -> None:
    index = make_index()
    index.insert("x", A + B + C)
    index.insert("y", A)
    index.insert("z", B + C)
    assert longest(index, A + B + C + D) == {"x": 3, "y": 1}
    assert index.lookup(b"") == {}
    assert index.lookup(D) == {}


def test_a_prefix_may_lie_in_several_tiers(make_index: MakeIndex) -> None:
    index = make_index()
    index.insert("x", A, Tier.DEVICE)
    index.insert("x", B, Tier.DISK)
    index.insert("x", C, Tier.HOST)
    index.insert("store", A + B, Tier.HOST)
    assert index.lookup(A + B + C + D) == {"x": (1, 1, 3, 3), "store": (0, 2, 2, 2)}
    index.insert("x", B, Tier.HOST)  # comes nearer: told there before it is gone from where it was
    assert index.lookup(A + B + C + D)["x"] == (1, 3, 3, 3)
    index.evict("x", B, Tier.DISK)
    assert index.held("x") == {Tier.DEVICE: 1, Tier.HOST: 2, Tier.DISK: 0, Tier.STORE: 0}
    assert index.lookup(A + B + C + D)["x"] == (1, 3, 3, 3)


def test_of_one_prefix_the_end_is_forgotten_first(make_index: MakeIndex) -> None:
    index = make_index(2)
    index.insert("x", A + B + C)
    assert longest(index, A + B + C) == {"x": 2}
    assert index.metrics.forgotten_blocks == 1


def test_what_is_looked_up_is_kept(make_index: MakeIndex) -> None:
    index = make_index(2)
    index.insert("x", A)
    index.insert("x", B)
    index.lookup(A)
    index.insert("x", C)
    assert longest(index, A) == {"x": 1}
    assert index.lookup(B) == {}


def test_metrics_count_the_best_match(make_index: MakeIndex) -> None:
    index = make_index()
    index.insert("x", A + B)
    index.insert("y", A + B)
    before = index.metrics
    assert (before.hit_ratio, before.blocks, before.holder_sets) == (0.0, 2, 1)
    index.lookup(A + B + C + D)
    metrics = index.metrics
    assert (metrics.lookups, metrics.queried_blocks, metrics.matched_blocks) == (1, 4, 2)
    assert metrics.hit_ratio == 0.5
    assert metrics.bytes_per_block * metrics.blocks == metrics.memory_bytes > 0
    assert make_index().metrics.bytes_per_block == 0.0


def test_a_worker_that_left_holds_nothing_and_another_may_come(make_index: MakeIndex) -> None:
    index = make_index()
    for turn in range(50):  # whoever comes gets the place of someone who left
        index.insert(f"w{turn}", A + B)
        index.insert(f"w{turn}", B, Tier.HOST)
        index.insert("stays", B + bytes([9, turn]) * 8)
        assert longest(index, A + B) == {f"w{turn}": 2}
        assert index.invalidate(f"w{turn}") == 3
        assert index.invalidate(f"w{turn}") == 0
        assert index.lookup(A + B) == {}
        assert longest(index, B) == {"stays": 1}
    assert len(index) == 51
    assert index.held("w0") == {}


def test_what_is_gone_gives_its_memory_to_what_comes(make_index: MakeIndex) -> None:
    index = make_index()
    index.insert("first", chain(0, 20_000))
    before = index.metrics.memory_bytes
    for turn in range(1, 6):
        index.invalidate("first")
        index.insert("first", chain(turn, 20_000))
    assert len(index) == 20_000
    assert index.metrics.memory_bytes < 1.3 * before


def test_long_chains_of_many_workers(make_index: MakeIndex) -> None:
    index, hashes = make_index(), chain(1, 5000)
    depths = {f"w{n}": depth for n, depth in enumerate((1, 63, 64, 65, 128, 4095, 4096, 4097, 5000))}
    for worker, depth in depths.items():
        index.insert(worker, hashes[: 16 * depth])
        index.insert(worker, chain(depth + 10, 500))
    assert longest(index, hashes) == depths
    assert longest(index, hashes[: 16 * 100]) == {worker: min(depth, 100) for worker, depth in depths.items()}
    for worker, depth in depths.items():
        index.evict(worker, hashes[16 * (depth // 2) : 16 * depth])
    assert longest(index, hashes) == {worker: depth // 2 for worker, depth in depths.items() if depth > 1}


def test_hashes_that_differ_in_few_bits_are_told_apart(make_index: MakeIndex) -> None:
    index = make_index()
    alike = [bytes(8) + bytes(7) + bytes([n]) for n in range(16)] + [bytes([n]) + bytes(15) for n in range(1, 256)]
    for n, one in enumerate(alike):
        index.insert(f"w{n % 7}", one)
    assert len(index) == len(alike)
    assert all(longest(index, one) == {f"w{n % 7}": 1} for n, one in enumerate(alike))


@pytest.mark.parametrize("hashes", [b"x", A + b"x"])
def test_half_a_hash_is_refused(make_index: MakeIndex, hashes: bytes) -> None:
    index = make_index()
    index.insert("x", A)
    for call in (index.lookup, lambda some: index.insert("x", some), lambda some: index.evict("x", some)):
        with pytest.raises(ValueError, match="no whole number of 16-byte hashes"):
            call(hashes)
    assert longest(index, A) == {"x": 1}


@pytest.mark.parametrize("max_blocks", [0, 1 << 40])
def test_a_bound_out_of_range_is_refused(max_blocks: int) -> None:
    with pytest.raises(ConfigError, match=f"max_blocks is {max_blocks}; it must be 1 to"):
        PrefixReuseIndex(max_blocks)


def test_more_workers_than_there_is_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder_table, "MAX_WORKERS", 3)
    table = PythonTable(10, contextlib.nullcontext())
    for _ in range(3):
        table.open()
    with pytest.raises(ConfigError, match="has 3 workers"):
        table.open()
    table.close(1)
    assert table.open() == 1


def test_the_compiled_index_has_room_for_all_workers_but_no_more() -> None:
    table = compiled(1000)
    for _ in range(holder_table.MAX_WORKERS):
        table.open()
    with pytest.raises(ConfigError, match="takes no more"):
        table.open()
    table.insert(5, Tier.STORE, A)
    assert table.close(5) == 1
    slot = table.open()  # what it held is visited first
    assert (slot, table.match(A), table.metrics().blocks) == (5, {}, 0)


def test_a_closed_slot_takes_no_blocks(make_index: MakeIndex) -> None:
    table = make_index()._table
    slot = table.open()
    assert table.close(slot) == 0
    table.insert(slot, Tier.DEVICE, A)
    table.remove(slot, Tier.DEVICE, A)
    assert (table.match(A), table.held(slot, Tier.DEVICE), table.metrics().blocks) == ({}, 0, 0)


def test_threads_look_up_while_others_insert_and_leave(make_index: MakeIndex) -> None:
    index, steady = make_index(40_000), chain(0, 300)
    index.insert("steady", steady)
    stop, errors, lookups = threading.Event(), list[BaseException](), itertools.count()

    def looking() -> None:
        try:
            while not stop.is_set():
                found = longest(index, steady)
                assert found["steady"] == 300
                assert set(found.values()) <= {0, 150, 300}
                next(lookups)
        except BaseException as error:
            errors.append(error)

    def coming_and_going(worker: str, seed: int) -> None:
        try:
            for turn in range(4):
                index.insert(worker, chain(seed + turn, 3000))
                index.insert(worker, steady[: 16 * 150])
                index.evict(worker, chain(seed + turn, 1000))
                index.invalidate(worker)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=looking) for _ in range(2)]
    writers = [threading.Thread(target=coming_and_going, args=(f"w{n}", 100 * n)) for n in range(1, 4)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert next(lookups) > 0
    assert (len(index), longest(index, steady)) == (300, {"steady": 300})


def test_a_worker_that_comes_during_a_lookup_crowds_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table = compiled(100)
    late = table.open()
    known, table._slots = table._slots, set()  # type: ignore[attr-defined]
    table.insert(late, Tier.DEVICE, A)
    asked = table._library.sage_index_match  # type: ignore[attr-defined]

    def told_after_the_first(*args: object) -> int:
        found = asked(*args)
        table._slots = known  # type: ignore[attr-defined]
        return int(found)

    monkeypatch.setattr(table, "_library", SimpleNamespace(sage_index_match=told_after_the_first))
    assert table.match(A) == {late: (1, 1, 1, 1)}
    monkeypatch.undo()
    assert table.metrics().lookups == 1
