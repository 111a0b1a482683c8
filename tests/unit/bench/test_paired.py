from __future__ import annotations

import itertools

import pytest

from bench.paired import Estimate, added, estimate, in_turns


async def test_a_steady_drift_is_taken_out() -> None:
    turns = itertools.count()

    async def base() -> float:
        return 10.0 + 0.5 * next(turns)

    async def other() -> float:
        return await base() + 3.0

    bases, others = await in_turns(base, other, 4)
    assert (len(bases), len(others)) == (5, 4)
    assert added(bases, others) == [3.0] * 4


def test_the_interval_holds_the_median_and_narrows_with_more_values() -> None:
    few, many = estimate([1.0, 2.0, 3.0] * 2), estimate([1.0, 1.9, 2.0, 2.1, 3.0] * 40)
    assert few.low <= few.value <= few.high
    assert (few.value, many.value, many.count) == (2.0, 2.0, 200)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.0, 2.0, "ok"), (2.1, 3.0, "MISSED"), (1.0, 3.0, "undecided")], ids=str
)
def test_only_an_interval_on_one_side_decides(low: float, high: float, verdict: str) -> None:
    assert Estimate((low + high) / 2, low, high, 9).verdict(2.0).startswith(verdict)
