from __future__ import annotations

import pytest

from sagellm_common.prefix_reuse.index import PrefixReuseIndex

A, B, C, D = (bytes([i]) * 16 for i in range(4))


def test_each_worker_has_its_own_longest_prefix() -> None:
    index = PrefixReuseIndex()
    index.insert("x", [A, B, C])
    index.insert("y", [A])
    index.insert("z", [B, C])
    assert index.lookup([A, B, C, D]) == {"x": 3, "y": 1}
    assert index.lookup([]) == {}
    assert index.lookup([D]) == {}


def test_of_one_prefix_the_end_is_forgotten_first() -> None:
    index = PrefixReuseIndex(max_blocks=2)
    index.insert("x", [A, B, C])
    assert index.lookup([A, B, C]) == {"x": 2}
    assert index.metrics.forgotten_blocks == 1


def test_what_is_looked_up_is_kept() -> None:
    index = PrefixReuseIndex(max_blocks=2)
    index.insert("x", [A])
    index.insert("x", [B])
    index.lookup([A])
    index.insert("x", [C])
    assert index.lookup([A]) == {"x": 1}
    assert index.lookup([B]) == {}


def test_metrics_count_the_best_match() -> None:
    index = PrefixReuseIndex()
    index.insert("x", [A, B])
    assert index.metrics.hit_ratio == 0.0
    index.lookup([A, B, C, D])
    assert (index.metrics.lookups, index.metrics.queried_blocks, index.metrics.matched_blocks) == (1, 4, 2)
    assert index.metrics.hit_ratio == 0.5


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_blocks is 0"):
        PrefixReuseIndex(max_blocks=0)
