"""PrefixReuseIndex against a dict of sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.prefix_reuse.index import PrefixReuseIndex

WORKERS = ("a", "b", "c")
BLOCKS = [bytes([i]) * 16 for i in range(8)]

workers = st.sampled_from(WORKERS)
blocks = st.lists(st.sampled_from(BLOCKS), max_size=6)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), workers, blocks),
        st.tuples(st.just("evict"), workers, blocks),
        st.tuples(st.just("invalidate"), workers, st.just([])),
        st.tuples(st.just("lookup"), workers, blocks),
    ),
    max_size=40,
)


def longest_prefixes(held: dict[str, set[bytes]], query: list[bytes]) -> dict[str, int]:
    depths = {}
    for worker, known in held.items():
        depth = next((i for i, block in enumerate(query) if block not in known), len(query))
        if depth:
            depths[worker] = depth
    return depths


@given(operations)
def test_unbounded_equals_the_oracle(script: list[tuple[str, str, list[bytes]]]) -> None:
    index, held = PrefixReuseIndex(), {worker: set[bytes]() for worker in WORKERS}
    for operation, worker, some in script:
        if operation == "insert":
            index.insert(worker, some)
            held[worker] |= set(some)
        elif operation == "evict":
            index.evict(worker, some)
            held[worker] -= set(some)
        elif operation == "invalidate":
            assert index.invalidate(worker) == len(held[worker])
            held[worker].clear()
        else:
            assert index.lookup(some) == longest_prefixes(held, some)
    assert len(index) == len(set().union(*held.values()))


@given(operations, st.integers(1, 6))
def test_bounded_it_forgets_but_never_invents(script: list[tuple[str, str, list[bytes]]], bound: int) -> None:
    index, held = PrefixReuseIndex(bound), {worker: set[bytes]() for worker in WORKERS}
    for operation, worker, some in script:
        if operation == "insert":
            index.insert(worker, some)
            held[worker] |= set(some)
        elif operation == "evict":
            index.evict(worker, some)
            held[worker] -= set(some)
        elif operation == "invalidate":
            index.invalidate(worker)
            held[worker].clear()
        else:
            truth = longest_prefixes(held, some)
            assert all(depth <= truth.get(holder, 0) for holder, depth in index.lookup(some).items())
        assert len(index) <= bound
