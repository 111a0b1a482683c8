from __future__ import annotations

import pytest

from sagellm_common.comm_backend import meter as meters
from sagellm_common.comm_backend.meter import PullMeter, current, metering


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(meters, "time", made)
    return made


def test_long_gaps_are_stalls_but_not_the_source_s_own_waits(time: Time) -> None:
    meter = PullMeter()
    for gap_s, waited in ((0.01, False), (0.3, False), (0.05, False), (2.0, True), (0.5, False)):
        time.now += gap_s
        if waited:
            meter.waited()
        else:
            meter.arrived(8)
    assert (meter.bytes, meter.stalls) == (32, 2)
    assert meter.first_byte_s == pytest.approx(0.01)
    assert meter.longest_stall_s == pytest.approx(0.5)


def test_pulls_add_up_whatever_ends_them(time: Time) -> None:
    with pytest.raises(ZeroDivisionError), metering() as whole:
        time.now += 1.0
        with metering() as part:
            assert current() is part
            time.now += 0.05
            part.arrived(4, 3)
        with metering() as part, part.digesting():
            time.now += 0.25
            part.arrived(4)
            raise ZeroDivisionError
    assert (whole.bytes, whole.stalls, whole.messages_saved, whole.digest_s) == (8, 1, 2, 0.25)
    assert whole.first_byte_s == pytest.approx(1.05)
    assert current() is not whole
