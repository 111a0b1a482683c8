"""Buffers of the nccl byte path, on the CPU: digests of rows, and memory that is no device's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sagellm_common.comm_backend.backends.nccl_staging import DeviceStaging, _weights
from tests.support.kv_channels import random_region

STAGING = DeviceStaging(torch.device("cpu"))


def naive(row: bytes) -> bytes:
    """In Python's integers."""
    row += bytes(-len(row) % 8)
    weights = [int(w) % 2**64 for w in _weights(len(row) // 8, torch.device("cpu"))]
    words = [int.from_bytes(row[at : at + 8], "little") for at in range(0, len(row), 8)]
    return (sum(w * x for w, x in zip(weights, words, strict=True)) % 2**64).to_bytes(8, "little")


@pytest.mark.parametrize("size", [1, 8, 13, 64, 1000])
def test_digests_are_weighted_sums(size: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (5, size), dtype=np.uint8))
    found = STAGING.digests(rows)
    assert found == b"".join(naive(row.numpy().tobytes()) for row in rows)
    for bit in range(8 * size if size < 64 else 64):
        flipped = rows.clone()
        flipped[2, bit // 8] ^= 1 << bit % 8
        other = STAGING.digests(flipped)
        assert other[16:24] != found[16:24]
        assert other[:16] + other[24:] == found[:16] + found[24:]


def test_words_that_change_places_show() -> None:
    """No two weights are alike, and each is odd: a word that counts twice as much would lose its highest bit."""
    weights = _weights(4096, torch.device("cpu"))
    assert len(weights.unique()) == 4096
    assert bool((weights & 1).all())


def test_memory_of_the_host_goes_through_it() -> None:
    source, target = random_region(8, 24, 1), random_region(8, 24, 2)
    rows, ids = STAGING.rows(3, 24), np.array([5, 0, 2], dtype=np.int32)
    STAGING.take(source, ids, rows)
    STAGING.give(rows, target, ids + 1)
    assert [bytes(target.block(b + 1)) for b in ids] == [bytes(source.block(b)) for b in ids]
