"""What `bench.serving` counts as engine, as transfer and as added."""

from __future__ import annotations

import pytest

from bench.serving_added import added_by_grpc, rows
from bench.serving_runs import Sample, sample
from sagellm_common.core.types import GenerationSummary


def seen(ttft_ms: float, tpot_ms: float, **summary: float) -> Sample:
    """Five tokens."""
    arrivals = [ttft_ms / 1e3 + i * tpot_ms / 1e3 for i in range(5)]
    return sample(arrivals, 0.0, GenerationSummary(**summary))  # type: ignore[arg-type]


def test_a_transfer_that_prefill_hides_is_not_taken_off_the_tokens() -> None:
    hidden = seen(50, 10, transfer_ms=8, transfer_exposed_ms=0.4)
    waited_for = seen(50, 10, transfer_ms=8, transfer_exposed_ms=9)  # one of them was not the transfer's
    assert hidden.transfer_ms == pytest.approx(0.1)
    assert waited_for.transfer_ms == pytest.approx(2)


async def test_added_is_what_neither_engine_nor_transfer_took_of_the_same_request() -> None:
    bare = iter([seen(40, 9), seen(44, 11), seen(48, 13)])
    through = iter(
        [
            seen(60, 12, prefill_engine_ms=57, decode_engine_ms=40, transfer_ms=4, transfer_exposed_ms=4),
            seen(70, 14, prefill_engine_ms=66, decode_engine_ms=44, transfer_ms=4, transfer_exposed_ms=4),
        ]
    )

    async def engine(prompt: list[int], new_tokens: int) -> Sample:
        return next(bare)

    async def over(prompt: list[int], new_tokens: int) -> Sample:
        return next(through)

    found = await added_by_grpc(engine, over, lambda: [1], 5, 2)
    first, token = found["first token"], found["per token"]
    assert (first.added.low, first.added.high) == pytest.approx((3, 4))  # 60 - 57 and 70 - 66
    assert (first.difference.low, first.difference.high) == pytest.approx((18, 24))  # from 42 and from 46 in process
    assert (token.added.low, token.added.high) == pytest.approx((1, 2))  # 12 - 10 - 1 and 14 - 11 - 1
    assert token.verdict == "MISSED" and first.verdict.startswith("undecided")
    assert len({len(row) for row in rows({"model": found})}) == 1
