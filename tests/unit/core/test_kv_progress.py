"""The watermark of a sequence: what its writer says and what those who wait see."""

from __future__ import annotations

import threading

import pytest

from sagellm_common.core.errors import EngineFailed, LeaseExpired
from sagellm_common.core.kv_progress import KvProgress, Watermark

TIMEOUT_S = 10.0


def progress(num_tokens: int = 100, cached: int = 0) -> KvProgress:
    return KvProgress(num_tokens, cached, block_size_tokens=16)


def test_what_is_cached_is_ready_from_the_start() -> None:
    assert progress(cached=32).wait(None, 0) == Watermark(32)


def test_layers_of_chunks() -> None:
    one = progress()
    one.chunk_begins(64)
    assert one.watermark == Watermark(0, 64, 0)
    one.layer_done(0)
    one.layer_done(1)
    assert one.watermark == Watermark(0, 64, 2)
    one.chunk_done()
    assert one.watermark == Watermark(64)
    one.chunk_begins(100)
    one.layer_done(0)
    assert one.watermark == Watermark(64, 100, 1)
    one.complete()
    assert one.watermark == Watermark(100)


@pytest.mark.parametrize("layer", [1, 5])
def test_a_layer_out_of_turn_counts_with_its_chunk(layer: int) -> None:
    one = progress()
    one.chunk_begins(64)
    one.layer_done(layer)
    assert one.watermark.layers == 0
    one.chunk_done()
    assert one.watermark == Watermark(64)


def test_a_layer_outside_a_chunk_counts_for_nothing() -> None:
    one = progress()
    one.layer_done(0)
    one.chunk_done()
    assert one.watermark == Watermark(0)


def test_tokens_after_the_prompt_are_nobodys_business() -> None:
    one = progress()
    one.complete()
    one.chunk_begins(101)
    one.layer_done(0)
    one.chunk_done()
    assert one.watermark == Watermark(100)


def test_a_failure_wakes_and_stays() -> None:
    one = progress()
    one.fail(EngineFailed("boom"))
    one.fail(LeaseExpired("later"))
    one.complete()
    assert one.failed
    for seen in (None, Watermark(0)):
        with pytest.raises(EngineFailed, match="boom"):
            one.wait(seen, TIMEOUT_S)


def test_what_is_complete_does_not_fail() -> None:
    one = progress()
    one.complete()
    one.fail(EngineFailed("boom"))
    assert one.wait(None, 0) == Watermark(100)


def test_waiting_ends_with_the_time() -> None:
    one = progress()
    assert one.wait(one.watermark, 0.001) == one.watermark


def test_whoever_waits_sees_every_rise_or_a_later_one() -> None:
    one, seen = progress(num_tokens=1000), [Watermark(0)]

    def follow() -> None:
        while seen[-1].tokens < one.num_tokens:
            seen.append(one.wait(seen[-1], TIMEOUT_S))

    follower = threading.Thread(target=follow)
    follower.start()
    for end in range(100, 1001, 100):
        one.chunk_begins(end)
        for layer in range(8):
            one.layer_done(layer)
        one.chunk_done()
    follower.join(TIMEOUT_S)
    assert not follower.is_alive()
    assert seen == sorted(seen, key=lambda mark: (mark.tokens, mark.chunk_end, mark.layers))
    assert seen[-1] == Watermark(1000)
