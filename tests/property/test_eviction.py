"""Any uses, evictions and removals: every policy holds what a set says, and gives up what it is asked to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.benchmarks.kv.replay import belady, replay
from sagellm_common.kv_policy.eviction import EVICTION, make_eviction

Path = tuple[tuple[int, ...], ...]


def path(tokens: Sequence[int]) -> Path:
    """Blocks of a sequence: each is named by all tokens up to its own, as a block hash is."""
    return tuple(tuple(tokens[: i + 1]) for i in range(len(tokens)))


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(path)
NO_TREE = st.lists(st.integers(0, 5), max_size=5).map(tuple)
"""Blocks that come twice, or after others than before: no hashes of prefixes would, but a trace may have it."""
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("access"), PATHS | NO_TREE),
        st.tuples(st.just("evict"), st.integers(1, 6), st.lists(PATHS | NO_TREE, max_size=2)),
        st.tuples(st.just("remove"), PATHS | NO_TREE.filter(bool)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", sorted(EVICTION))
@given(steps=STEPS)
@settings(max_examples=60)
def test_what_is_held_is_what_was_used_and_not_given_up(name: str, steps: list[tuple[object, ...]]) -> None:
    policy, held = make_eviction(name, 8), set[object]()
    for step in steps:
        match step:
            case ("access", blocks):
                policy.access(blocks)  # type: ignore[arg-type]
                held.update(blocks)  # type: ignore[arg-type]
            case ("evict", int(count), paths):
                keep = {block for blocks in paths for block in blocks}  # type: ignore[attr-defined]
                gone = policy.evict(count, keep)
                assert len(set(gone)) == len(gone) <= count
                assert set(gone) <= held - keep
                assert len(gone) == min(count, len(held - keep))
                held.difference_update(gone)
            case ("remove", blocks):
                policy.remove(blocks[-1])  # type: ignore[index]
                held.discard(blocks[-1])  # type: ignore[index]
        assert len(policy) == len(held)
        assert set(policy) == held


@pytest.mark.parametrize("name", ["adaptive", "cost-aware", "lru"])
@given(paths=st.lists(PATHS, max_size=20), capacity=st.integers(1, 8))
def test_no_block_is_left_without_its_parents(name: str, paths: list[Path], capacity: int) -> None:
    policy = make_eviction(name, capacity)
    for blocks in paths:
        policy.access(blocks)
        policy.evict(max(0, len(policy) - capacity))
        held = set(policy)
        assert len(held) <= capacity
        assert all(block[:-1] in held for block in held if len(block) > 1)  # type: ignore[arg-type, index]


@given(paths=st.lists(PATHS, min_size=1, max_size=12), capacity=st.integers(1, 6))
def test_no_policy_beats_beladys(paths: list[Path], capacity: int) -> None:
    numbers = {block: i for i, block in enumerate(dict.fromkeys(block for blocks in paths for block in blocks))}
    trace = [[numbers[block] for block in blocks] for blocks in paths]
    best = belady(trace, capacity)
    for name in EVICTION:
        assert replay(trace, capacity, make_eviction(name, capacity), clock=lambda: 0).hit_rate <= best + 1e-12


@given(paths=st.lists(PATHS, min_size=1, max_size=5), capacity=st.integers(1, 3))
@settings(max_examples=40)
def test_beladys_is_the_best_of_all_ways(paths: list[Path], capacity: int) -> None:
    accesses = [block for blocks in paths for block in blocks][:10]
    numbers = {block: i for i, block in enumerate(dict.fromkeys(accesses))}
    trace = [[numbers[block] for block in accesses]]

    def most_hits(at: int, held: frozenset[int]) -> int:
        if at == len(trace[0]):
            return 0
        block = trace[0][at]
        after = held | {block}
        ways = [after] if len(after) <= capacity else [after - {victim} for victim in after]
        return (block in held) + max(most_hits(at + 1, way) for way in ways)

    assert belady(trace, capacity) == pytest.approx(most_hits(0, frozenset()) / len(accesses))
