"""Pieces of memory: native and Python give the same bytes, those of the xxhash library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_common.comm_backend import native, pieces
from sagellm_common.comm_backend.native import __main__ as command
from sagellm_common.comm_backend.pieces import Pieces, blocks, checked, of_segment
from sagellm_common.comm_backend.segments import Segment
from sagellm_common.core import cxx
from tests.support.kv_channels import random_region

MEMORY = np.random.default_rng(3).integers(0, 256, 90_000, dtype=np.uint8)


def libraries() -> list[native.Library | None]:
    """Python alone, and the library in each of the ways this CPU knows."""
    if cxx.compiler() is None:
        return [None]
    native.build()
    native.library.cache_clear()
    built = native.library()
    assert built is not None
    return [None, *(replace(built, isas=built.isas[: n + 1]) for n in built.isas)]


@pytest.fixture(params=libraries(), ids=lambda library: f"isa{library.isas[-1]}" if library else "python")
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[native.Library | None]:
    monkeypatch.setattr(native, "library", lambda: request.param)
    yield request.param


def some(sizes: list[int], seed: int = 0) -> Pieces:
    rng = np.random.default_rng(seed)
    lengths = np.array(sizes, dtype=np.int64)
    # Side by side in another order, at odd addresses.
    order, at = rng.permutation(len(sizes)), int(rng.integers(0, 8))
    offsets = np.empty(len(sizes), dtype=np.int64)
    for n in order:
        offsets[n] = at
        at += sizes[n] + int(rng.integers(0, 3))
    return Pieces(memoryview(MEMORY.copy()), offsets, lengths)


def contents(found: Pieces) -> list[bytes]:
    return [bytes(found.memory[at : at + size]) for at, size in zip(found.offsets, found.sizes, strict=True)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 2200), min_size=1, max_size=12), st.integers(0, 9))
def test_copies_and_digests(library: native.Library | None, sizes: list[int], seed: int) -> None:
    source, target = some(sizes, seed), some(sizes, seed + 1)
    expected = b"".join(xxhash.xxh3_64_digest(piece) for piece in contents(source))
    assert pieces.digests(source) == expected
    before = bytearray(target.memory)
    assert pieces.copy(source, target, digest=True) == expected
    for at, piece in zip(target.offsets.tolist(), contents(source), strict=True):
        before[at : at + len(piece)] = piece
    assert bytes(target.memory) == before, "a copy wrote beside its pieces"
    assert pieces.copy(source, some(sizes, seed + 2), digest=False) == b""


@pytest.mark.parametrize("size", [240, 241, 304, 305, 1023, 1024, 1025, 1088, 2048, 2049, 8192])
def test_lengths_at_which_the_algorithm_turns(library: native.Library | None, size: int) -> None:
    found = some([size] * pieces.FEW)
    assert pieces.digests(found) == b"".join(xxhash.xxh3_64_digest(piece) for piece in contents(found))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    units=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5),
    stripe=st.sampled_from([64, 1]),
    seed=st.integers(0, 9),
)
def test_several_pieces_share_a_digest(
    library: native.Library | None, units: list[list[int]], stripe: int, seed: int
) -> None:
    """As if their bytes lay side by side; in stripes natively, unless there are too few of them."""
    sizes = [size * stripe for unit in units for size in unit]
    parts = np.array([len(unit) for unit in units], dtype=np.int64)
    source, target = some(sizes, seed), replace(some(sizes, seed + 1), parts=parts)
    bounds = np.cumsum([0, *parts])
    joined = [b"".join(contents(source)[a:b]) for a, b in itertools.pairwise(bounds)]
    expected = b"".join(xxhash.xxh3_64_digest(unit) for unit in joined)
    assert pieces.digests(replace(source, parts=parts)) == expected
    assert pieces.copy(source, target, digest=True) == expected
    assert contents(target) == contents(source)
    assert target.unit_sizes.tolist() == [len(unit) for unit in joined]
    # Where units lie in one piece each, one after the other.
    begins = np.cumsum([0, *target.unit_sizes[:-1]])
    assert target.within_units(begins).tolist() == np.cumsum([0, *sizes[:-1]]).tolist()


@pytest.mark.parametrize("shift", [0, 8])
def test_large_copies(library: native.Library | None, shift: int) -> None:
    """They pass the caches by where their target is aligned."""
    size, count = (384 << 10) + 100 * (shift > 0), 3
    source = Pieces(memoryview(np.random.default_rng(5).bytes(count * size)), *_in_order(0, size, count))
    memory = np.zeros(count * size + 64 + shift, dtype=np.uint8)
    target = Pieces(memory.data, *_in_order(-memory.ctypes.data % 64 + shift, size, count))
    found = pieces.copy(source, target, digest=True)
    assert contents(target) == contents(source)
    assert found == b"".join(xxhash.xxh3_64_digest(piece) for piece in contents(source))


def _in_order(at: int, size: int, count: int) -> tuple[pieces.Offsets, pieces.Offsets]:
    return np.arange(count, dtype=np.int64) * size + at, np.full(count, size)


def test_no_pieces_and_unequal_ones(library: native.Library | None) -> None:
    assert pieces.digests(some([])) == pieces.copy(some([]), some([]), digest=True) == b""
    with pytest.raises(ValueError, match="different sizes"):
        pieces.copy(some([300, 300]), some([300, 301]), digest=False)


@pytest.mark.parametrize("ids", [[64], [0, 64], [-1], [3, -1]])
def test_blocks_outside_the_pool(ids: list[int]) -> None:
    with pytest.raises(IndexError, match="pool of 64"):
        blocks(random_region(64, 8), np.array(ids, dtype=np.int32))


def test_pieces_outside_of_the_memory() -> None:
    memory = memoryview(bytes(10))
    checked(memory, np.array([0, 5]), np.array([5, 5]))
    for at, size in ((6, 5), (-1, 2), (2, -1)):
        with pytest.raises(IndexError, match="memory of 10"):
            checked(memory, np.array([at]), np.array([size]))


def test_layers_are_cut_as_the_region_lists_them() -> None:
    region, ids = random_region(8, 64, num_layers=4), np.array([5, 2], dtype=np.int32)
    whole = of_segment(region, ids, Segment(0, 2, 0, 4), 4)
    assert contents(whole) == [bytes(region.block(5)), bytes(region.block(2))]
    found = of_segment(region, ids, Segment(0, 2, 1, 3), 4)
    views = region.layers(ids, 1, 3)
    assert contents(found) == [bytes(view) for view in views]


def test_neighbours_are_one_vector() -> None:
    region = random_region(8, 64)
    for ids, runs in (([3], [64]), ([0, 1, 2], [192]), ([4, 5, 1, 2, 3], [128, 192]), ([7, 6], [64, 64])):
        found = blocks(region, np.array(ids, dtype=np.int32)).vectors(1000, before=True, after=True)
        assert found[1:-1, 1].tolist() == runs
        assert found[1, 0] == 1000 + 64 * ids[0]


def test_without_a_compiler_setup_goes_on_if_it_may(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    monkeypatch.setenv("SAGELLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cxx, "compiler", lambda: None)
    for arguments, code in (([], 1), (["--optional"], 0)):
        monkeypatch.setattr("sys.argv", ["native", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == code
        assert "Python does them" in capsys.readouterr().err


def test_it_says_that_it_was_not_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    monkeypatch.setenv("SAGELLM_CACHE", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "python -m sagellm_common.comm_backend.native" in caplog.text
    finally:
        native.library.cache_clear()
