"""Planning of messages and of overlap, against brute force."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_common.comm_backend.fusion import plan_messages, transfer_seconds
from sagellm_common.comm_backend.overlap import ARRANGE_S, efficiency, exposed_seconds, plan_overlap
from sagellm_common.core.topology import LinkCost

COSTS = st.builds(
    LinkCost,
    source_id=st.just("a"),
    target_id=st.just("b"),
    backend=st.just("tcp"),
    latency_s=st.floats(0, 1e-2),
    bytes_per_s=st.floats(1e6, 1e11),
    per_message_s=st.floats(1e-7, 1e-3),
)


def compositions(n: int) -> list[list[int]]:
    """All ways to cut n blocks into messages, in order."""
    found = []
    for cuts in range(n):
        for at in combinations(range(1, n), cuts):
            ends = [0, *at, n]
            found.append([b - a for a, b in pairwise(ends)])
    return found


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 9), block_bytes=st.integers(1, 1 << 20), link=COSTS, most=st.integers(1, 10))
def test_no_way_to_cut_the_blocks_is_faster(n: int, block_bytes: int, link: LinkCost, most: int) -> None:
    plan = plan_messages(n, block_bytes, link, max_bytes=most * block_bytes, max_blocks=9)
    allowed = [cut for cut in compositions(n) if max(cut) <= min(most, 9)]
    best = min(transfer_seconds([blocks * block_bytes for blocks in cut], link) for cut in allowed)
    assert plan.seconds == pytest.approx(best, rel=1e-9)


@given(
    n=st.integers(1, 5000),
    block_bytes=st.integers(1, 4 << 20),
    link=COSTS,
    max_bytes=st.integers(1, 8 << 20),
    max_blocks=st.integers(1, 1000),
)
def test_a_plan_keeps_its_bounds(n: int, block_bytes: int, link: LinkCost, max_bytes: int, max_blocks: int) -> None:
    plan = plan_messages(n, block_bytes, link, max_bytes=max_bytes, max_blocks=max_blocks)
    assert 1 <= plan.blocks_per_message <= max(1, min(n, max_blocks))
    assert plan.blocks_per_message * block_bytes <= max(max_bytes, block_bytes)
    assert 1 <= plan.depth <= 16


def simulated_exposure(num_bytes: int, compute_s: float, link: LinkCost, size: int) -> float:
    """Piece by piece: each is sent when it is computed and the one before it is there."""
    pieces = math.ceil(num_bytes / size)
    each_s = link.per_message_s + min(size, num_bytes) / link.bytes_per_s
    there_s = 0.0
    for n in range(pieces):
        there_s = max(there_s, compute_s * (n + 1) / pieces) + each_s
    return there_s - compute_s + link.latency_s + pieces * link.per_message_s


@given(num_bytes=st.integers(1, 1 << 28), compute_s=st.floats(0, 10), link=COSTS, pieces=st.integers(1, 200))
def test_the_exposure_of_overlapped_pieces(num_bytes: int, compute_s: float, link: LinkCost, pieces: int) -> None:
    size = -(-num_bytes // pieces)
    expected = simulated_exposure(num_bytes, compute_s, link, size)
    assert exposed_seconds(num_bytes, compute_s, link, size) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(
    blocks=st.integers(1, 2000),
    compute_s=st.floats(1e-4, 10),
    link=COSTS,
    layers=st.sampled_from([2, 24, 32]),
)
def test_overlap_is_planned_where_it_pays_and_in_the_best_pieces(
    blocks: int, compute_s: float, link: LinkCost, layers: int
) -> None:
    block_bytes, most = layers * 8192, 4 << 20
    num_bytes = blocks * block_bytes
    plan = plan_overlap(num_bytes, compute_s, link, block_bytes=block_bytes, least_bytes=8192, most_bytes=most)
    sizes = [8192 << n for n in range(20) if 8192 << n <= min(most, num_bytes)]
    best = min(exposed_seconds(num_bytes, compute_s, link, size) for size in sizes)
    assert plan.overlap == (plan.exposed_without_s - best > ARRANGE_S)
    assert plan.prefill.begin_s <= plan.migration.begin_s <= plan.migration.end_s
    assert plan.decode_begins_s == pytest.approx(plan.prefill.end_s + plan.exposed_s)
    if plan.overlap:
        assert plan.exposed_s == best
        assert exposed_seconds(num_bytes, compute_s, link, plan.segment_bytes) == best
        assert plan.migration.begin_s <= plan.prefill.end_s
    else:
        assert (plan.segment_bytes, plan.exposed_s) == (0, plan.exposed_without_s)


@given(moving=st.floats(0, 100), exposed=st.floats(0, 100))
def test_efficiency_is_a_share(moving: float, exposed: float) -> None:
    assert 0 <= efficiency(moving, exposed) <= 1
