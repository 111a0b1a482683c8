from __future__ import annotations

import asyncio

import pytest

from bench.benchmarks.router import report
from bench.benchmarks.router.clients import Ask, Timed, run
from bench.benchmarks.router.http_parts import HttpReader
from bench.benchmarks.router.measure import Contestant, Measured, Round
from bench.benchmarks.router.pace import Pace

WITH_LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
IN_CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\na\r\n0\r\n0\r\n\r\n"
EMPTY = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_http_messages_are_found_however_they_are_cut(at_once: int) -> None:
    bodies: list[bytes] = []
    heard: list[bytes] = []
    reader = HttpReader(lambda head, body: bodies.append(body), heard.append)
    data = WITH_LENGTH + IN_CHUNKS + EMPTY
    for start in range(0, len(data), at_once):
        reader.feed(data[start : start + at_once])
    assert bodies == [b"hello", b"4\r\na\r\n0\r\n0\r\n\r\n", b""]
    assert b"hello"[:1] in b"".join(heard)


async def test_all_sequences_step_together_and_short_ones_at_once() -> None:
    pace, seen = Pace(0.001), list[tuple[str, int, bool]]()
    done = asyncio.Event()

    def taker(name: str) -> object:
        def take(index: int, last: bool) -> None:
            seen.append((name, index, last))
            if last and name == "b":
                done.set()

        return take

    pace.submit("short", 0, 2, taker("short"))  # type: ignore[arg-type]
    assert seen == [("short", 0, False), ("short", 1, True)]
    pace.submit("a", 0, 3, taker("a"))  # type: ignore[arg-type]
    pace.submit("b", 1, 4, taker("b"))  # type: ignore[arg-type]
    pace.submit("gone", 0, 9, taker("gone"))  # type: ignore[arg-type]
    pace.cancel("gone")
    await done.wait()
    assert seen[2:] == [(name, i + (name == "b"), i == 2) for i in range(3) for name in ("a", "b")]


async def test_so_many_requests_on_so_many_lines() -> None:
    now, most = 0, 0

    async def line() -> Ask:
        async def ask(num_tokens: int) -> Timed:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1
            return Timed(0.0, float(num_tokens))

        return ask

    timed = await run(line, 3, 10, 2)
    assert len(timed) == 10
    assert most == 3


async def test_the_first_error_is_told() -> None:
    async def line() -> Ask:
        raise ConnectionError("nobody there")

    with pytest.raises(ConnectionError, match="nobody there"):
        await run(line, 2, 2, 2)


def test_tokens_are_charged_without_what_their_requests_cost() -> None:
    async def line() -> Ask:
        raise AssertionError

    one = Contestant("one", line, {"router": 1}, "base")
    base = Contestant("base", line, {})
    found = Measured()
    found.rounds = {
        report.REQUESTS: {
            "one": [Round({"router": 0.1}, 1.0, 100, 200, 0.0, 0.0)],
            "base": [Round({}, 1.0, 100, 200, 0, 0)],
        },
        report.ALONE: {
            "one": [Round({"router": 0.0}, 1, 9, 18, 0.003, 0.004)],
            "base": [Round({}, 1, 9, 18, 0.001, 0.001)],
        },
        report.PACED: {
            "one": [Round({"router": 0.03}, 1.0, 10, 1000, 0.02, 0.0)],
            "base": [Round({}, 1, 10, 1000, 0, 0)],
        },
    }
    first, second = report.rows(found, [one, base])
    assert first.cpu_us_per_request == {"router": pytest.approx(1000)}
    assert first.cpu_us_per_paced_token == {"router": pytest.approx(20)}
    assert (first.added_p50_ms, first.added_first_p50_ms) == (pytest.approx(3), pytest.approx(2))
    assert (second.cpu_us_per_request, second.added_p50_ms) == ({}, None)
    table = report.markdown([first, second], "on a quiet day", {"sglang-router": "not asked for"})
    assert "| one | 1000 | 20.0 | 100 | +3.00 | +2.00 |" in table
    assert "sglang-router: skipped, not asked for" in table
