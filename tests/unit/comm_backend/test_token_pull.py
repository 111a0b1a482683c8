"""What a pull of tokens asks of a byte path, and what it makes of the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sagellm_common.comm_backend.backends.mock import MockChannel, MockNetwork
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.comm_backend.protocol import Encoding, Pull, PullAlong, TransferResult
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.comm_backend.token_pull import TokenPuller
from sagellm_common.comm_backend.transcode import row_bytes
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import InvalidRequest, PeerLost
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.types import BlockIds, KvLayout, KvSource

TIMEOUT_S = 5.0


def a_layout(size: int, dtype: str = "float32") -> KvLayout:
    layout = KvLayout("m", dtype, size, 2, 2, 4, 0)
    return replace(layout, block_bytes=sum(row_bytes(layout)) * 2 * size)


def a_pool(layout: KvLayout, num_blocks: int = 16) -> KvRegion:
    return KvRegion(memoryview(bytearray(layout.block_bytes * num_blocks)), layout.block_bytes, num_blocks)


def a_source(num_blocks: int, num_tokens: int) -> KvSource:
    table = np.arange(num_blocks, dtype=np.int32)
    return KvSource("t", 1, "prefill-0", "i", "c", "d", "fake", table, num_tokens, 1000)


class FakeChannel:
    """Remembers what it was asked for, and fills blocks with zeros."""

    name = "fake"
    address = ""

    def __init__(self, encodes: bool, error: Exception | None = None) -> None:
        self.pulls_along = True
        self.encodes = encodes
        self.error = error
        self.asked: list[tuple[list[int], list[int], KvMemory | None, Encoding | None]] = []

    async def pull(self, asked: Pull) -> TransferResult:
        return self._pulled(asked, asked.source_blocks)

    async def pull_along(self, asked: PullAlong) -> TransferResult:
        return self._pulled(asked, asked.source.block_table[asked.first_block :])

    def _pulled(self, asked: Pull | PullAlong, source_blocks: BlockIds) -> TransferResult:
        target_blocks, into, encoding = asked.target_blocks, asked.into, asked.encoding
        self.asked.append((source_blocks.tolist(), target_blocks.tolist(), into, encoding))
        if into is not None and not isinstance(into, KvRegion):
            for block in target_blocks.tolist():
                with into.writing(np.array([block], np.int32)) as (region, ids):
                    region.block(int(ids[0]))[:] = bytes(region.block_bytes)
                if self.error is not None:
                    raise self.error
        deviation = Deviation(0.5, 4.0, 16.0, 0) if encoding else None
        return TransferResult(100, 0.1, len(target_blocks), deviation)


def queue(channel: FakeChannel) -> PullQueue:
    return PullQueue(channel, 4, 4)  # type: ignore[arg-type]


def puller(channel: FakeChannel, layout: KvLayout, **transport: Any) -> TokenPuller:
    return TokenPuller(queue(channel), a_pool(layout), layout, lambda: TransportConfig(**transport))


TABLE = np.array([5, 3, 9, 1], np.int32)


async def test_one_layout_goes_straight_into_the_pool() -> None:
    channel = FakeChannel(encodes=True)
    found = await puller(channel, a_layout(4)).pull(a_source(4, 14), a_layout(4), TABLE, 4, 14, timeout_s=TIMEOUT_S)
    assert channel.asked == [([1, 2, 3], [3, 9, 1], None, None)]
    assert (found.bytes, found.blocks, found.conversion) == (100, 3, None)


async def test_a_smaller_dtype_is_asked_for_with_what_counts_of_the_last_block() -> None:
    channel, wire = FakeChannel(encodes=True), a_layout(4, "int8/float32")
    tokens = puller(channel, a_layout(4), wire_dtype="int8")
    found = await tokens.pull(a_source(4, 14), a_layout(4), TABLE, 4, 14, timeout_s=TIMEOUT_S)
    ((source_blocks, _, into, encoding),) = channel.asked
    assert source_blocks == [1, 2, 3]
    assert into is not None
    assert into.block_bytes == wire.block_bytes
    assert encoding == Encoding("int8/float32", wire.block_bytes, 2)
    conversion = found.conversion
    assert conversion is not None
    assert (conversion.wire_dtype, conversion.max_abs_error, conversion.relative_rms_error) == (
        "int8/float32",
        0.5,
        0.5,
    )


async def test_the_receivers_own_dtype_goes_straight_into_its_pool() -> None:
    """The source makes it of its own, since it is smaller: nothing is left to do here."""
    channel, mine = FakeChannel(encodes=True), a_layout(4, "int8/float32")
    found = await puller(channel, mine).pull(a_source(4, 16), a_layout(4), TABLE, 0, 16, timeout_s=TIMEOUT_S)
    ((_, target_blocks, into, encoding),) = channel.asked
    assert (target_blocks, into, encoding) == (TABLE.tolist(), None, Encoding("int8/float32", mine.block_bytes, 4))
    assert found.conversion is not None


async def test_a_byte_path_that_does_not_encode_brings_blocks_as_they_are() -> None:
    channel = FakeChannel(encodes=False)
    mine = a_layout(4, "bfloat16")
    found = await puller(channel, mine).pull(a_source(4, 16), a_layout(4), TABLE, 0, 16, timeout_s=TIMEOUT_S)
    ((source_blocks, target_blocks, into, encoding),) = channel.asked
    assert (source_blocks, target_blocks, encoding) == ([0, 1, 2, 3], [0, 1, 2, 3], None)
    assert into is not None and into.block_bytes == a_layout(4).block_bytes
    assert found.conversion is not None
    assert found.conversion.wire_dtype == "float32"
    await puller(channel, mine).pull_along(
        a_source(4, 16), a_layout(4), TABLE, 0, timeout_s=TIMEOUT_S, on_bytes=lambda _: None
    )
    assert channel.asked[1][3] is None


async def test_a_pull_along_of_other_blocks_never_names_blocks_of_the_pool() -> None:
    """Its numbers are those of the memory it is told to fill: in the pool they would be somebody else's."""
    channel, wire = FakeChannel(encodes=True), a_layout(4, "int8/float32")
    tokens = puller(channel, a_layout(2), wire_dtype="int8")
    await tokens.pull_along(
        a_source(4, 14),
        a_layout(4),
        np.arange(15, 8, -1, dtype=np.int32),
        4,
        timeout_s=TIMEOUT_S,
        on_bytes=lambda _: None,
    )
    ((source_blocks, target_blocks, into, encoding),) = channel.asked
    assert (source_blocks, target_blocks) == ([1, 2, 3], [0, 1, 2])
    assert into is not None
    assert into.block_bytes == wire.block_bytes
    assert encoding == Encoding("int8/float32", wire.block_bytes, 2)


@pytest.mark.parametrize("link_bytes_per_s", [0.0, 1e12])
async def test_auto_leaves_a_fast_or_unknown_link_exact(link_bytes_per_s: float) -> None:
    channel = FakeChannel(encodes=True)
    tokens = puller(channel, a_layout(4), wire_dtype="auto", link_bytes_per_s=link_bytes_per_s)
    await tokens.pull(a_source(4, 16), a_layout(4), TABLE, 0, 16, timeout_s=TIMEOUT_S)
    assert channel.asked[0][2:] == (None, None)


@pytest.mark.parametrize(
    ("configured", "planned", "crosses"), [("same", "int8", "int8/float32"), ("int8", "same", None)]
)
async def test_a_plan_goes_before_the_configuration(configured: str, planned: str, crosses: str | None) -> None:
    channel = FakeChannel(encodes=True)
    tokens = puller(channel, a_layout(4), wire_dtype=configured)
    await tokens.pull(a_source(4, 16), a_layout(4), TABLE, 0, 16, timeout_s=TIMEOUT_S, wire_dtype=planned)
    await tokens.pull_along(
        a_source(4, 16),
        a_layout(4),
        TABLE,
        0,
        timeout_s=TIMEOUT_S,
        on_bytes=lambda _: None,
        wire_dtype=planned,
    )
    assert [encoding.dtype if encoding else None for *_, encoding in channel.asked] == [crosses, crosses]


async def test_auto_asks_how_fast_the_link_to_this_source_is() -> None:
    channel, asked = FakeChannel(encodes=True), []

    def link_speed(source: KvSource) -> float:
        asked.append(source.worker_id)
        return 10.0

    settings = TransportConfig(wire_dtype="auto")
    tokens = TokenPuller(queue(channel), a_pool(a_layout(4)), a_layout(4), lambda: settings, link_speed)
    await tokens.pull(a_source(4, 16), a_layout(4), TABLE, 0, 16, timeout_s=TIMEOUT_S)
    assert asked == ["prefill-0"]
    encoding = channel.asked[0][3]
    assert encoding is not None


async def test_an_error_on_the_way_is_the_answer_and_ends_the_writing() -> None:
    mine, lost = a_layout(2), PeerLost("gone")
    pool = a_pool(mine)
    tokens = TokenPuller(queue(FakeChannel(encodes=True, error=lost)), pool, mine)
    with pytest.raises(PeerLost, match="gone"):
        await tokens.pull(a_source(4, 16), a_layout(4), np.arange(8, dtype=np.int32), 0, 16, timeout_s=TIMEOUT_S)


async def test_too_few_blocks_for_the_tokens() -> None:
    with pytest.raises(InvalidRequest, match="3 blocks of 4 tokens, too few for 14"):
        await puller(FakeChannel(encodes=True), a_layout(4)).pull(
            a_source(3, 14), a_layout(4), TABLE, 0, 14, timeout_s=TIMEOUT_S
        )


async def test_what_only_an_encoding_byte_path_can_do_is_refused_by_others() -> None:
    leases = HandoffSource(1.0, ManualClock(), lambda _: None)
    channel = MockChannel(MockNetwork(), lambda: a_pool(a_layout(4)), leases)
    ids = np.array([0], np.int32)
    with pytest.raises(InvalidRequest, match="over mock blocks come in the source's dtype"):
        await channel.pull(Pull(a_source(1, 4), ids, ids, timeout_s=1.0, encoding=Encoding("bfloat16", 1, 4)))
