"""Which plan a pull gets: of the link, of the settings, of a measurement."""

from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.comm_backend.config import KVTransportConfig
from sagellm_common.comm_backend.fusion import MessagePlanner, plan_messages
from sagellm_common.comm_backend.links import LinkTable
from sagellm_common.comm_backend.overlap import plan_overlap
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import KvSource

LINK = LinkCost("w", "", "tcp", latency_s=100e-6, bytes_per_s=1e9, per_message_s=50e-6)
SOURCE = KvSource("t", 1, "w", "i", "c", "d", "tcp", np.arange(100, dtype=np.int32), 1600, 1000)
KIB = 1 << 10


def planner(**settings: object) -> tuple[MessagePlanner, LinkTable]:
    links = LinkTable()
    return MessagePlanner(KVTransportConfig(TransportConfig.model_validate(settings)), links), links


def blocks_per_message(messages: MessagePlanner, num_blocks: int = 100) -> int:
    return messages.plan(SOURCE, num_blocks, 16 * KIB, default_bytes=1 << 20, max_blocks=1000).blocks_per_message


def test_a_link_that_nobody_knows_gets_the_default() -> None:
    messages, _ = planner()
    assert blocks_per_message(messages) == 64


def test_a_configured_size_bounds_it() -> None:
    messages, _ = planner(chunk_bytes=64 * KIB)
    assert blocks_per_message(messages) == 4


def test_a_known_link_decides() -> None:
    messages, links = planner()
    links.set_probed("w", "tcp", LINK)
    # sqrt(100 blocks x 50 us / 16.4 us per block) = 17.5
    assert 14 <= blocks_per_message(messages) <= 20
    assert links.find("other", "tcp") is None


def test_costly_messages_are_large_and_a_slow_link_has_small_ones() -> None:
    costly = plan_messages(100, 16 * KIB, LinkCost("", "", "", 0, 1e9, 1e-3), max_bytes=8 << 20, max_blocks=1000)
    slow = plan_messages(100, 16 * KIB, LinkCost("", "", "", 0, 1e7, 50e-6), max_bytes=8 << 20, max_blocks=1000)
    assert slow.blocks_per_message < 14 < 20 < costly.blocks_per_message


def test_latency_is_hidden_by_depth() -> None:
    near = plan_messages(1000, 16 * KIB, LinkCost("", "", "", 0, 1e9, 50e-6), max_bytes=1 << 20, max_blocks=1000)
    far = plan_messages(1000, 16 * KIB, LinkCost("", "", "", 5e-3, 1e9, 50e-6), max_bytes=1 << 20, max_blocks=1000)
    assert near.depth == 2
    assert far.depth > near.depth


def test_fusion_off_is_the_configured_size() -> None:
    messages, links = planner(fusion="off", chunk_bytes=32 * KIB)
    links.set_probed("w", "tcp", LINK)
    assert blocks_per_message(messages) == 2


def test_a_change_at_run_time_counts_from_the_next_pull_on() -> None:
    messages, _ = planner()
    messages.settings.set({"chunk_bytes": str(160 * KIB)})
    assert blocks_per_message(messages) == 10


def test_a_measurement_has_its_way_while_it_lasts() -> None:
    messages, links = planner()
    links.set_probed("w", "tcp", LINK)
    messages.force("t", 1)
    assert blocks_per_message(messages) == 1
    messages.force("t", 0)
    assert blocks_per_message(messages) > 1


@pytest.mark.parametrize(
    ("num_bytes", "compute_s", "overlaps"),
    [(64 << 20, 1.0, True), (1 << 20, 1e-4, False), (16 << 10, 1.0, False)],
    ids=["long", "nothing-to-hide-behind", "tiny"],
)
def test_overlap_is_for_what_takes_long(num_bytes: int, compute_s: float, overlaps: bool) -> None:
    link = LinkCost("a", "b", "tcp", 100e-6, 1e9, 20e-6)
    plan = plan_overlap(num_bytes, compute_s, link, block_bytes=16 << 10, least_bytes=4096, most_bytes=4 << 20)
    assert plan.overlap == overlaps
    assert ("along the prefill" in plan.reason) == overlaps
