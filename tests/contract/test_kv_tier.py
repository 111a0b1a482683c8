"""What every tier below a pool does (`TierBackend`). A new one is one more `make_…` in TIERS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.kv import BlockEvent
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.host_tier import HostTier
from sagellm_common.kv_runtime.tiers import TierBackend
from tests.support.kv_tiers import BLOCK_BYTES, LAYOUT, file_tier, keys, read, write

NUM_BLOCKS = 8


def make_host(scratch: Path) -> TierBackend:
    return HostTier(HostKvPool(NUM_BLOCKS * BLOCK_BYTES, ManualClock(), LAYOUT))


def make_file(scratch: Path) -> TierBackend:
    return file_tier(scratch, NUM_BLOCKS)[0]


TIERS = [make_host, make_file]


@pytest.fixture(params=TIERS, ids=lambda make: make.__name__.removeprefix("make_"))
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TierBackend]:
    made: TierBackend = request.param(tmp_path)
    yield made
    made.close()
    made.close()


def test_what_was_written_is_read(tier: TierBackend) -> None:
    wanted = keys(5)
    assert tier.block_bytes == BLOCK_BYTES
    assert read(tier, wanted) == 0
    assert write(tier, wanted) == 5
    assert tier.holds([key.hash for key in keys(6)]) == [True] * 5 + [False]
    assert sorted(tier.hashes()) == sorted(key.hash for key in wanted)
    assert read(tier, wanted) == 5
    assert read(tier, wanted[2:4]) == 2


def test_reading_ends_with_the_first_block_that_is_not_here(tier: TierBackend) -> None:
    wanted = keys(5)
    write(tier, [*wanted[:2], *wanted[3:]])
    assert read(tier, wanted) == 2
    assert read(tier, wanted[3:]) == 2


def test_other_tokens_under_the_same_hash_are_no_hit(tier: TierBackend) -> None:
    wanted = keys(3)
    write(tier, wanted)
    forged = [wanted[0], replace(wanted[1], token_bytes=bytes(16)), wanted[2]]
    assert read(tier, forged) == 1
    assert read(tier, [replace(wanted[0], token_bytes=bytes(12))]) == 0


def test_blocks_are_written_once(tier: TierBackend) -> None:
    wanted = keys(4)
    write(tier, wanted[:2])
    assert write(tier, wanted) == 4
    assert tier.stats().stored_blocks == 4


def test_of_more_than_there_is_room_for_the_first_are_stored(tier: TierBackend) -> None:
    wanted = keys(NUM_BLOCKS + 3)
    assert write(tier, wanted) == NUM_BLOCKS
    assert read(tier, wanted) == NUM_BLOCKS


def test_what_is_used_stays_and_the_end_of_a_sequence_goes_first(tier: TierBackend) -> None:
    old, used, new = keys(4), keys(4, 100), keys(2, 200)
    write(tier, old)
    write(tier, used)
    write(tier, new)
    assert read(tier, old) == 2
    assert read(tier, used) == 4
    assert read(tier, new) == 2
    assert tier.stats().evicted_blocks == 2


def test_keys_are_as_they_were_written(tier: TierBackend) -> None:
    wanted = keys(3)
    write(tier, wanted)
    assert tier.keys([key.hash for key in keys(4)]) == wanted


def test_removed_blocks_are_gone(tier: TierBackend) -> None:
    wanted = keys(4)
    write(tier, wanted)
    tier.remove([wanted[3].hash, b"unknown"])
    assert read(tier, wanted) == 3
    assert write(tier, wanted) == 4


def test_changes_are_told(tier: TierBackend) -> None:
    seen: list[BlockEvent] = []
    tier.watch(seen.append)
    wanted = keys(NUM_BLOCKS)
    write(tier, wanted)
    write(tier, keys(1, 100))
    tier.remove([wanted[0].hash])
    assert [set(event.stored) for event in seen if event.stored] == [
        {key.hash for key in wanted},
        {keys(1, 100)[0].hash},
    ]
    assert [event.removed for event in seen if event.removed] == [(wanted[-1].hash,), (wanted[0].hash,)]


def test_counts(tier: TierBackend) -> None:
    wanted = keys(3)
    write(tier, wanted)
    read(tier, wanted)
    stats = tier.stats()
    assert (stats.name, stats.dtype) == (tier.name, "float32")
    assert (stats.total_blocks, stats.used_blocks, stats.used_bytes) == (NUM_BLOCKS, 3, 3 * BLOCK_BYTES)
    assert (stats.stored_blocks, stats.hit_blocks) == (3, 3)
    assert stats.bytes_read == stats.bytes_written == 3 * BLOCK_BYTES
