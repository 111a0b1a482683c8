from __future__ import annotations

from collections import Counter

import pytest

from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent, extents, ranked

STORES = [f"kv-store-{n}" for n in range(5)]
KNOWN = [0, 2, 0, 2, 1, 2, 2, 2, 0, 2, 0, 0]
KEYS = [n.to_bytes(16, "little") for n in range(2000)]


@pytest.mark.parametrize(
    ("first", "stop", "expected"),
    [
        (0, 0, []),
        (0, 1, [(0, 0, 1)]),
        (0, 32, [(0, 0, 32)]),
        (0, 70, [(0, 0, 32), (32, 32, 64), (64, 64, 70)]),
        (33, 66, [(32, 33, 64), (64, 64, 66)]),
        (40, 40, []),
    ],
)
def test_a_sequence_is_cut_where_every_other_is(first: int, stop: int, expected: list[tuple[int, int, int]]) -> None:
    hashes = KEYS[:70]
    found = extents(hashes, first, stop)
    assert found == [Extent(hashes[key], begin, end) for key, begin, end in expected]
    assert [e.offset for e in found] == [begin % EXTENT_BLOCKS for _, begin, _ in expected]
    assert sum(e.num_blocks for e in found) == stop - first


def test_without_bounds_all_of_it() -> None:
    assert sum(e.num_blocks for e in extents(KEYS[:70])) == 70


def test_the_order_of_the_stores_does_not_matter() -> None:
    assert all(ranked(key, STORES) == ranked(key, reversed(STORES)) for key in KEYS[:100])


def test_known_ranks_stay() -> None:
    """Stores and workers of different versions must agree."""
    assert [ranked(key, STORES[:3]).index("kv-store-0") for key in KEYS[:12]] == KNOWN


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_store_that_leaves_moves_only_what_it_had(replicas: int) -> None:
    for gone in STORES:
        left = [store for store in STORES if store != gone]
        for key in KEYS[:300]:
            before, after = ranked(key, STORES)[:replicas], ranked(key, left)[:replicas]
            assert [store for store in before if store != gone] == after[: len(before) - (gone in before)]


def test_all_get_their_share() -> None:
    owners = Counter(ranked(key, STORES)[0] for key in KEYS)
    expected = len(KEYS) / len(STORES)
    assert all(abs(count - expected) < 0.15 * expected for count in owners.values()), owners
