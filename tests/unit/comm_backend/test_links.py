from __future__ import annotations

import pytest

from sagellm_common.comm_backend.links import LinkFit, LinkTable, best_per_source, changed_noticeably
from sagellm_common.core.topology import LinkCost

MIB = 1 << 20


def cost(source: str = "a", backend: str = "tcp", latency_s: float = 1e-4, bytes_per_s: float = 1e9) -> LinkCost:
    return LinkCost(source, "b", backend, latency_s, bytes_per_s)


def test_a_line_through_transfers_of_many_sizes() -> None:
    fit = LinkFit()
    for num_bytes in (4096, MIB, 16 * MIB, 64 << 10, 8192):
        fit.observe(num_bytes, 200e-6 + num_bytes / 2e9)
    assert (fit.latency_s, fit.bytes_per_s) == (pytest.approx(200e-6), pytest.approx(2e9))
    assert fit.samples == 5


def test_many_small_transfers_do_not_displace_the_bandwidth() -> None:
    table = LinkTable()
    table.set_probed("a", "tcp", cost(bytes_per_s=2e9))
    for n in range(200):
        table.observe("a", "tcp", 8192 + n, 150e-6 * (1 + n % 3 / 10))
    found = table.find("a", "tcp")
    assert found is not None
    assert found.bytes_per_s == pytest.approx(2e9, rel=0.05)
    assert 100e-6 < found.latency_s < 200e-6


def test_a_link_that_became_slower_is_noticed() -> None:
    table = LinkTable()
    table.set_probed("a", "tcp", cost(bytes_per_s=2e9))
    for _ in range(30):
        table.observe("a", "tcp", 64 * MIB, 1e-4 + 64 * MIB / 5e8)
    found = table.find("a", "tcp")
    assert found is not None
    assert found.bytes_per_s == pytest.approx(5e8, rel=0.05)


def test_small_transfers_alone_say_latency_only() -> None:
    fit = LinkFit()
    for num_bytes in (8192, 24576, 8192):
        fit.observe(num_bytes, 400e-6)
    assert fit.bytes_per_s == pytest.approx(1e9)
    assert fit.latency_s == pytest.approx(385e-6, rel=0.05)
    fast = LinkFit()
    fast.observe(200_000, 20e-6)  # faster than assumed
    assert (fast.latency_s, fast.bytes_per_s) == (0, pytest.approx(1e10))


def test_one_size_says_bandwidth_only() -> None:
    fit = LinkFit()
    fit.observe(MIB, 1e-3)
    assert (fit.latency_s, fit.bytes_per_s) == (0, pytest.approx(MIB / 1e-3))


def test_nonsense_never_makes_a_negative_cost() -> None:
    fit = LinkFit()
    for num_bytes, seconds in [(1, 5.0), (MIB, 1e-3), (64 * MIB, 1e-5), (4096, 9.0)]:
        fit.observe(num_bytes, seconds)
        assert fit.latency_s >= 0
        assert fit.bytes_per_s > 0


def test_what_teaches_nothing_is_passed_over() -> None:
    table = LinkTable()
    table.observe("a", "tcp", 0, 1.0)
    table.observe("a", "tcp", 5, 0.0)
    assert table.all() == []


def test_links_are_kept_apart_and_forgotten_with_their_source() -> None:
    table = LinkTable(lambda: 12.0)
    for source, backend in [("a", "tcp"), ("a", "shm"), ("c", "tcp")]:
        table.observe(source, backend, 100, 1.0)
    assert [(link.source_id, link.backend, link.measured_at_s) for link in table.all()] == [
        ("a", "shm", 12.0),
        ("a", "tcp", 12.0),
        ("c", "tcp", 12.0),
    ]
    table.keep(["c", "d"])
    assert [link.source_id for link in table.all()] == ["c"]


def test_the_faster_path_of_a_source_is_told() -> None:
    fast, slow = cost(backend="shm", bytes_per_s=9e9), cost()
    assert best_per_source([slow, fast, cost("c")]) == [fast, cost("c")]


def test_only_noticeable_changes_are_told() -> None:
    assert changed_noticeably(None, cost())
    assert not changed_noticeably(cost(), cost(bytes_per_s=1.1e9))
    assert changed_noticeably(cost(), cost(bytes_per_s=2e9))
    assert changed_noticeably(cost(), cost(latency_s=5e-4))
    assert changed_noticeably(cost(), cost(backend="shm"))
