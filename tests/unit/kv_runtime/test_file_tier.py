"""The disk tier over its own restarts: what is there again, and what is found out to be torn."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvRegion
from sagellm_common.kv_runtime.backends import file_slots
from sagellm_common.kv_runtime.backends.file import FileTier
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.file_slots import PAGE_BYTES
from sagellm_common.kv_runtime.tiers import BlockKey, keys_of
from tests.support.kv_channels import a_layout
from tests.support.kv_tiers import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    LAYOUT,
    RECORD_BYTES,
    SLOT_BYTES,
    chain,
    file_tier,
    keys,
    read,
    write,
)


def reopened(path: Path, after: Callable[[Path], None] = lambda directory: None, num_blocks: int = 8) -> FileTier:
    """As a process finds it whose predecessor died: nothing was closed that would be closed in order."""
    (directory,) = (entry for entry in path.iterdir() if entry.is_dir())
    after(directory)
    return file_tier(path, num_blocks)[0]


def left_behind(path: Path, wanted: list[BlockKey], num_blocks: int = 8) -> None:
    tier, directory = file_tier(path, num_blocks)
    write(tier, wanted)
    directory.close()


def test_blocks_are_there_after_a_restart(tmp_path: Path) -> None:
    wanted = [*keys(3), *keys(2, 100)]
    wanted[1] = replace(wanted[1], note=b"off by 0.01")
    left_behind(tmp_path, wanted)
    tier = reopened(tmp_path)
    assert tier.stats().recovered_blocks == 5
    assert tier.keys([key.hash for key in wanted]) == wanted
    assert read(tier, keys(3)) == 3
    assert read(tier, keys(2, 100)) == 2
    assert tier.stats().torn_blocks == 0
    # The order in which they were written, and nothing newer than them.
    write(tier, keys(5, 200))
    assert [read(tier, keys(3)), read(tier, keys(2, 100)), read(tier, keys(5, 200))] == [1, 2, 5]


@pytest.mark.parametrize("at", [0, 17, BLOCK_BYTES - 1])
def test_a_flipped_byte_costs_its_block(tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
    wanted = keys(4)
    left_behind(tmp_path, wanted)

    def flip(directory: Path) -> None:
        with (directory / "extent-00000").open("r+b") as extent:
            extent.seek(2 * PAGE_BYTES + at)
            byte = extent.read(1)
            extent.seek(-1, os.SEEK_CUR)
            extent.write(bytes([byte[0] ^ 1]))

    tier = reopened(tmp_path, flip)
    seen = []
    tier.watch(seen.append)
    assert read(tier, wanted) == 2
    assert tier.stats().torn_blocks == 1
    assert [event.removed for event in seen] == [(wanted[2].hash,)]
    assert "not what was written" in caplog.text
    assert tier.holds([key.hash for key in wanted]) == [True, True, False, True]
    assert write(tier, wanted) == 4
    assert read(tier, wanted) == 4


@pytest.mark.parametrize("at", [0, 8, 30, RECORD_BYTES - 1])
def test_a_record_that_is_not_what_was_written_is_dropped(tmp_path: Path, at: int) -> None:
    wanted = keys(4)
    left_behind(tmp_path, wanted)

    def flip(directory: Path) -> None:
        table = bytearray((directory / "table").read_bytes())
        table[RECORD_BYTES + at] ^= 0x80
        (directory / "table").write_bytes(table)

    tier = reopened(tmp_path, flip)
    assert tier.holds([key.hash for key in wanted]) == [True, False, True, True]
    assert (tier.stats().torn_blocks, tier.stats().recovered_blocks) == (1, 3)
    assert write(tier, wanted) == 4
    assert read(reopened_quietly(tmp_path, tier), wanted) == 4


def reopened_quietly(path: Path, tier: FileTier) -> FileTier:
    tier.close()
    (directory,) = (entry for entry in path.iterdir() if entry.is_dir())
    return FileTier(directory, LAYOUT, 8 * SLOT_BYTES)


def test_what_came_before_a_block_is_known_after_a_restart(tmp_path: Path) -> None:
    """Blocks of one name and the same tokens, after different ones, are not each other."""
    hashes, token_ids = chain(2)
    one, another = (keys_of(hashes, token_ids, BLOCK_TOKENS, before=before) for before in (b"one", b"another"))
    left_behind(tmp_path, one)
    tier = reopened(tmp_path)
    assert [key.context for key in tier.keys(hashes)] == [key.context for key in one]
    assert (read(tier, another), read(tier, another[1:]), read(tier, one[1:])) == (0, 0, 1)


def test_a_table_that_ends_within_a_record(tmp_path: Path) -> None:
    left_behind(tmp_path, keys(4))
    tier = reopened(tmp_path, lambda directory: os.truncate(directory / "table", 3 * RECORD_BYTES - 5))
    assert tier.holds([key.hash for key in keys(4)]) == [True, True, False, False]
    assert tier.stats().torn_blocks == 1


def test_an_extent_that_lost_its_end(tmp_path: Path) -> None:
    left_behind(tmp_path, keys(4))
    tier = reopened(tmp_path, lambda directory: os.truncate(directory / "extent-00000", 2 * PAGE_BYTES + 10))
    assert read(tier, keys(4)) == 2
    assert read(tier, keys(4)[2:]) == 0
    assert tier.stats().torn_blocks == 2
    assert write(tier, keys(4)) == 4
    assert read(tier, keys(4)) == 4


def test_an_extent_that_loses_its_end_while_it_is_used(tmp_path: Path) -> None:
    tier, _ = file_tier(tmp_path)
    write(tier, keys(4))
    (directory,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    os.truncate(directory / "extent-00000", PAGE_BYTES + 10)
    assert read(tier, keys(4)) == 1
    assert tier.stats().torn_blocks == 3


def test_two_slots_of_one_block_are_one(tmp_path: Path) -> None:
    """A block was evicted, and written again elsewhere, before its first slot's record was cleared."""
    left_behind(tmp_path, keys(3))

    def copy(directory: Path) -> None:
        for name, size in (("table", RECORD_BYTES), ("extent-00000", PAGE_BYTES)):
            data = bytearray((directory / name).read_bytes().ljust(8 * size, b"\0"))
            data[5 * size : 6 * size] = data[:size]
            (directory / name).write_bytes(data)

    tier = reopened(tmp_path, copy)
    assert tier.stats().recovered_blocks == 3
    assert write(tier, keys(8)) == 8
    assert read(tier, keys(8)) == 8


def test_slots_of_evicted_blocks_do_not_come_back(tmp_path: Path) -> None:
    tier, directory = file_tier(tmp_path, num_blocks=3)
    write(tier, keys(3))
    write(tier, keys(3, 100))
    directory.close()
    again = reopened(tmp_path, num_blocks=3)
    assert sorted(again.hashes()) == sorted(key.hash for key in keys(3, 100))
    assert again.stats().torn_blocks == 0


def test_several_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_slots, "EXTENT_BYTES", 3 * PAGE_BYTES)
    left_behind(tmp_path, keys(8))
    (directory,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    assert [file.stat().st_size // PAGE_BYTES for file in sorted(directory.glob("extent-*"))] == [3, 3, 2]
    tier = reopened(tmp_path)
    assert read(tier, keys(8)) == 8
    # A smaller budget: what is beyond it goes, and nothing of the rest.
    tier = reopened_with(tmp_path, 4)
    assert [file.stat().st_size // PAGE_BYTES for file in sorted(directory.glob("extent-*"))] == [3, 1]
    assert (tier.stats().total_blocks, read(tier, keys(8))) == (4, 4)
    assert tier.stats().torn_blocks == 0
    # And a larger one.
    assert write(reopened_with(tmp_path, 7), keys(7)) == 7


def reopened_with(path: Path, num_blocks: int) -> FileTier:
    (directory,) = (entry for entry in path.iterdir() if entry.is_dir())
    return FileTier(directory, LAYOUT, num_blocks * SLOT_BYTES)


def test_many_blocks_take_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_slots, "IO_BYTES", 3 * PAGE_BYTES)
    tier, _ = file_tier(tmp_path)
    assert write(tier, keys(8)) == 8
    assert read(tier, keys(8)) == 8


def test_calls_that_move_less_than_asked_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev, preadv = os.pwritev, os.preadv

    def first(buffers: list[memoryview]) -> list[memoryview]:
        return [buffers[0][: max(1, len(buffers[0]) // 2)]] if len(buffers[0]) % 2 == 0 else buffers[:3]

    monkeypatch.setattr(os, "pwritev", lambda file, buffers, offset: pwritev(file, first(buffers), offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, first(buffers), offset))
    tier, _ = file_tier(tmp_path)
    assert write(tier, keys(5)) == 5
    assert read(tier, keys(5)) == 5


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_device_that_fails_costs_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    tier, _ = file_tier(tmp_path)
    write(tier, keys(2))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "pwritev":
            assert write(tier, keys(2, 100)) == 0
        else:
            assert read(tier, keys(2)) == 0
    assert "Input/output error" in caplog.text
    assert tier.stats().failed_blocks == 2
    assert write(tier, keys(8, 200)) == 8
    assert read(tier, keys(8, 200)) == 8


def test_a_slot_that_is_being_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, _ = file_tier(tmp_path, num_blocks=2)
    write(tier, keys(2))
    preadv, inside = os.preadv, []

    def during(file: int, buffers: list[memoryview], offset: int) -> int:
        if not inside:
            inside.append(write(tier, keys(2, 100)))  # evicts both
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", during)
    assert read(tier, keys(2)) == 2
    assert inside == [0]
    assert write(tier, keys(2, 100)) == 2
    assert read(tier, keys(2, 100)) == 2


def test_direct_io(tmp_path: Path) -> None:
    from sagellm_common.core import shared_memory

    layout = a_layout(block_bytes=PAGE_BYTES, block_size_tokens=4)
    tier = TierDirectory(tmp_path, 16 * PAGE_BYTES, direct_io=True).open(layout)
    memory = memoryview(shared_memory.allocate(4 * PAGE_BYTES).arena)
    region, ids = KvRegion(memory, PAGE_BYTES, 4), np.arange(4, dtype=np.int32)
    memory[:] = os.urandom(4 * PAGE_BYTES)
    written = bytes(memory)
    assert tier.write(keys(4), region, ids) == 4
    memory[:] = bytes(4 * PAGE_BYTES)
    assert tier.read(keys(4), region, ids) == 4
    assert bytes(memory) == written


def test_direct_io_of_odd_blocks_is_said_to_be_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = TierDirectory(tmp_path, 16 * PAGE_BYTES, direct_io=True).open(LAYOUT)
    assert "direct_io has no effect" in caplog.text
    assert write(tier, keys(2)) == read(tier, keys(2)) == 2


def test_a_closed_tier_has_nothing(tmp_path: Path) -> None:
    tier, _ = file_tier(tmp_path)
    write(tier, keys(2))
    tier.close()
    assert read(tier, keys(2)) == 0
    assert write(tier, keys(3)) == 2  # as it was


def test_a_use_elsewhere_counts(tmp_path: Path) -> None:
    tier, _ = file_tier(tmp_path)
    write(tier, keys(4))
    write(tier, keys(4, 100))
    tier.used([key.hash for key in keys(4)])
    write(tier, keys(1, 200))
    assert (read(tier, keys(4)), read(tier, keys(4, 100))) == (4, 3)


# ---- the directory ----


def test_one_process_at_a_time(tmp_path: Path) -> None:
    _, directory = file_tier(tmp_path)
    with pytest.raises(ConfigError, match=rf"kv_store.disk.path: '{tmp_path}' is in use by process {os.getpid()}"):
        TierDirectory(tmp_path, 1 << 20)
    directory.close()
    directory.close()
    TierDirectory(tmp_path, 1 << 20).close()


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="kv_store.disk.path: .*cannot be written.*Not a directory"):
        TierDirectory(tmp_path / "file" / "kv", 1 << 20)


def test_a_budget_below_one_block(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"kv_store.disk.budget_bytes is 100, but one block .* takes {SLOT_BYTES}"):
        TierDirectory(tmp_path, 100).open(LAYOUT)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_slots, "EXTENT_BYTES", 3 * PAGE_BYTES)
    tier, directory = file_tier(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert write(tier, keys(8)) == 3
        assert "takes no more of the disk than 3 blocks: " in caplog.text
        directory.close()
        with pytest.raises(ConfigError, match="No space left on device"):
            TierDirectory(tmp_path / "other", 1 << 20).open(LAYOUT)
    assert write(tier, keys(8)) == 8


def test_each_layout_has_its_own_and_the_oldest_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_slots, "EXTENT_BYTES", 2 * PAGE_BYTES)
    layouts = [a_layout(BLOCK_BYTES, BLOCK_TOKENS, name) for name in ("first", "second", "third")]
    budget = 8 * PAGE_BYTES  # an extent each, their tables and layouts
    for n, layout in enumerate(layouts[:2]):
        directory = TierDirectory(tmp_path, budget)
        write(directory.open(layout), keys(2))
        directory.close()
        for file in tmp_path.glob("*/layout.json"):
            if json.loads(file.read_text())["layout"]["model_fingerprint"] == layout.model_fingerprint:
                os.utime(file, (n, n))
    (tmp_path / "somebody-elses").mkdir()
    (tmp_path / "somebody-elses" / "layout.json").write_text("{")
    directory = TierDirectory(tmp_path, budget)
    assert directory.layouts() == [layouts[1], layouts[0]]
    assert read(directory.open(layouts[1]), keys(2)) == 2
    directory.open(layouts[2])
    assert directory.layouts() == [layouts[2], layouts[1]]
    assert "removes KV of model first" in caplog.text
    assert (tmp_path / "somebody-elses").exists()


def test_blocks_kept_in_another_dtype_are_apart(tmp_path: Path) -> None:
    directory = TierDirectory(tmp_path, 64 * SLOT_BYTES)
    kept = replace(LAYOUT, dtype="int8/float32", block_bytes=32)
    tier = directory.open(LAYOUT, kept)
    assert (tier.block_bytes, tier.stats().dtype) == (32, "int8/float32")
    assert directory.layouts() == [LAYOUT]
