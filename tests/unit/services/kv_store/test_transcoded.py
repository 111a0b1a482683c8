"""Blocks kept on the disk in fewer bytes: what they lose, and who is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sagellm_common.comm_backend.kv_dtypes import parse
from sagellm_common.comm_backend.transcode import with_dtype
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import LayoutMismatch
from sagellm_common.core.types import BlockHash, KvLayout, TokenIds
from sagellm_common.kv_runtime.backends.file import FileTier
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.host_tier import HostTier
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.kv_runtime.tiers import keys_of
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from services.kv_store.transcoded import TranscodedTier, conversion, kept_layout
from tests.support.kv_channels import random_region

PATIENCE_S = 10.0
FLOAT32 = parse("float32")
assert FLOAT32 is not None
LAYOUT = with_dtype(KvLayout("tiny", "", 4, 2, 2, 8, 0), FLOAT32)
BUDGET_BYTES = 1 << 20


def chain(num_blocks: int, first_token: int = 0) -> tuple[list[BlockHash], TokenIds]:
    token_ids = np.arange(first_token, first_token + 4 * num_blocks, dtype=np.int32)
    return block_hashes(token_ids, 4, root_hash(LAYOUT)), token_ids


def stack(path: Path, dtype: str, memory_blocks: int = 4) -> HierarchyManager:
    directory = TierDirectory(path, BUDGET_BYTES)
    kept = kept_layout(LAYOUT, dtype)
    tiers = HierarchyManager(
        HostKvPool(memory_blocks * LAYOUT.block_bytes, ManualClock()),
        lambda layout: [TranscodedTier(directory.open(layout, kept), layout, kept)],
    )
    tiers.adopt(LAYOUT)
    return tiers


def put(tiers: HierarchyManager, num_blocks: int, first_token: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    """Numbers of the blocks, as they were put."""
    numbers = np.random.default_rng(seed).standard_normal((num_blocks, LAYOUT.block_bytes // 4)).astype(np.float32)
    pending = tiers.begin_put(*chain(num_blocks, first_token))
    for block_id, row in zip(pending.allocation.block_ids.tolist(), numbers, strict=True):
        tiers.regions().block(block_id)[:] = row.tobytes()
    tiers.commit_put(pending)
    assert tiers.flush(PATIENCE_S)
    return numbers


def get(tiers: HierarchyManager, num_blocks: int, first_token: int) -> np.ndarray:  # type: ignore[type-arg]
    hashes, token_ids = chain(num_blocks, first_token)
    if tiers.below(hashes):
        tiers.promote(hashes, token_ids, PATIENCE_S)
    got = tiers.get(hashes, token_ids)
    assert len(got.block_ids) == num_blocks
    read = np.stack([np.frombuffer(tiers.regions().block(b), np.float32).copy() for b in got.block_ids.tolist()])
    tiers.free(got)
    return read


@pytest.mark.parametrize(("dtype", "at_most"), [("bf16", 0.005), ("int8", 0.01), ("int4", 0.15)])
def test_what_comes_back_is_as_far_off_as_is_said(tmp_path: Path, dtype: str, at_most: float) -> None:
    tiers = stack(tmp_path, dtype)
    numbers = put(tiers, 3, 0, seed=1)
    assert np.array_equal(get(tiers, 3, 0), numbers)  # still in memory: exact
    assert conversion(tiers.notes(chain(3)[0])) is None
    put(tiers, 4, 100, seed=2)
    read = get(tiers, 3, 0)
    told = conversion(tiers.notes(chain(3)[0]))
    assert told is not None
    assert told.wire_dtype == kept_layout(LAYOUT, dtype).dtype
    error = read - numbers
    assert told.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-6)
    rms = float(np.sqrt((error.astype(np.float64) ** 2).sum() / (numbers.astype(np.float64) ** 2).sum()))
    assert told.relative_rms_error == pytest.approx(rms, rel=1e-3)
    assert 0 < rms < at_most
    # Exact hits and others are counted apart, wherever the blocks are by now.
    get(tiers, 3, 0)
    dram, nvme = tiers.stats()
    assert (dram.hit_blocks, dram.inexact_hit_blocks) == (6, 3)
    assert (nvme.hit_blocks, nvme.inexact_hit_blocks, nvme.dtype) == (3, 3, told.wire_dtype)
    assert nvme.used_bytes < 7 * LAYOUT.block_bytes
    tiers.close()


def test_what_was_lost_is_known_after_a_restart_and_nothing_more_is_lost(tmp_path: Path) -> None:
    tiers = stack(tmp_path, "int8")
    put(tiers, 2, 0, seed=1)
    put(tiers, 4, 100, seed=2)
    first = get(tiers, 2, 0)
    before = conversion(tiers.notes(chain(2)[0]))
    tiers.close()
    again = HierarchyManager(HostKvPool(4 * LAYOUT.block_bytes, ManualClock()), lambda layout: [reopened(tmp_path)])
    again.adopt(LAYOUT)
    assert np.array_equal(get(again, 2, 0), first)
    assert conversion(again.notes(chain(2)[0])) == before
    again.close()


def reopened(path: Path) -> TranscodedTier:
    kept = kept_layout(LAYOUT, "int8")
    (directory,) = (entry for entry in path.iterdir() if entry.is_dir())
    return TranscodedTier(FileTier(directory, kept, BUDGET_BYTES), LAYOUT, kept)


def test_an_exact_copy_that_comes_later_is_exact(tmp_path: Path) -> None:
    tiers = stack(tmp_path, "int8")
    numbers = put(tiers, 2, 0, seed=1)
    put(tiers, 4, 100, seed=2)
    get(tiers, 2, 0)
    put(tiers, 4, 200, seed=3)
    assert tiers.notes(chain(2)[0]) == []  # memory has given them up
    assert np.array_equal(put(tiers, 2, 0, seed=1), numbers)
    assert np.array_equal(get(tiers, 2, 0), numbers)
    assert conversion(tiers.notes(chain(2)[0])) is None
    tiers.close()


def test_blocks_that_are_there_are_not_converted_again(tmp_path: Path) -> None:
    kept = kept_layout(LAYOUT, "int8")
    tier = TranscodedTier(TierDirectory(tmp_path, BUDGET_BYTES).open(LAYOUT, kept), LAYOUT, kept)
    region, ids = random_region(3, LAYOUT.block_bytes), np.arange(3, dtype=np.int32)
    keys = keys_of(*chain(3), 4)
    assert tier.write(keys[:2], region, ids[:2]) == 2
    assert tier.write(keys, region, ids) == 3
    assert tier.stats().stored_blocks == 3
    tier.remove([keys[2].hash])
    assert tier.holds([key.hash for key in keys]) == [True, True, False]
    assert sorted(tier.hashes()) == sorted(key.hash for key in keys[:2])
    assert tier.write([], region, ids[:0]) == tier.read([], region, ids[:0]) == 0
    tier.close()


def test_a_dtype_that_is_no_smaller_or_not_known_changes_nothing() -> None:
    assert kept_layout(LAYOUT, "same") == LAYOUT
    small = kept_layout(LAYOUT, "int8")
    assert kept_layout(small, "fp16") == small
    odd = KvLayout("tiny", "nf4", 4, 2, 2, 8, 64)
    assert kept_layout(odd, "int8") == odd
    host = HostTier(HostKvPool(1 << 16, ManualClock(), odd))
    with pytest.raises(LayoutMismatch):
        TranscodedTier(host, LAYOUT, odd)
