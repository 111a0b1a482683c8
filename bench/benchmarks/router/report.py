"""Numbers, table and picture of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.benchmarks.router.measure import Contestant, Measured, Round
from bench.plots import grouped_bars

REQUESTS, ALONE, PACED = "requests", "alone", "paced"


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over rounds. CPU is that of `parts` by name; nothing, for who has no process between."""

    name: str
    cpu_us_per_request: dict[str, float]
    cpu_us_per_paced_token: dict[str, float]
    requests_per_s: float
    added_p50_ms: float | None
    added_first_p50_ms: float | None
    paced_first_ms: float


def rows(found: Measured, contestants: Sequence[Contestant]) -> Iterator[Row]:
    for one in contestants:
        requests, alone, paced = (found.rounds[load][one.name] for load in (REQUESTS, ALONE, PACED))
        base = found.rounds[ALONE][one.base] if one.base else None
        per_request = {part: _median([r.cpu_s[part] / r.requests for r in requests]) for part in one.processes}
        yield Row(
            one.name,
            {part: 1e6 * seconds for part, seconds in per_request.items()},
            {
                part: 1e6 * _median([(r.cpu_s[part] - r.requests * per_request[part]) / r.tokens for r in paced])
                for part in one.processes
            },
            _median([r.requests / r.wall_s for r in requests]),
            _added(alone, base, "last_s"),
            _added(alone, base, "first_s"),
            1e3 * _median([r.first_s for r in paced]),
        )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _added(alone: Sequence[Round], base: Sequence[Round] | None, what: str) -> float | None:
    """Of each round to its own base: the machine's pace drifts."""
    if base is None:
        return None
    return 1e3 * _median([getattr(a, what) - getattr(b, what) for a, b in zip(alone, base, strict=True)])


def markdown(table: Sequence[Row], conditions: str, skipped: dict[str, str]) -> str:
    head = "| | CPU µs/request | CPU µs/paced token | requests/s | added p50 c=1, ms | added TTFT p50, ms |"
    lines = [conditions, "", head, "|---" * 6 + "|"]
    for row in table:
        added = ["–" if v is None else f"{v:+.2f}" for v in (row.added_p50_ms, row.added_first_p50_ms)]
        cells = [_parts(row.cpu_us_per_request, 0), _parts(row.cpu_us_per_paced_token, 1), f"{row.requests_per_s:.0f}"]
        lines.append(f"| {' | '.join([row.name, *cells, *added])} |")
    lines += ["", *(f"{name}: skipped, {why}" for name, why in skipped.items())]
    return "\n".join(lines).rstrip() + "\n"


def _parts(values: dict[str, float], digits: int) -> str:
    if len(values) == 1:
        return f"{next(iter(values.values())):.{digits}f}"
    return ", ".join(f"{part} {value:.{digits}f}" for part, value in values.items()) or "–"


def plot(table: Sequence[Row], title: str, out: Path) -> None:
    shown = [row for row in table if row.cpu_us_per_request]

    def series(values: str) -> dict[str, dict[str, float]]:
        return {row.name: {"": sum(getattr(row, values).values())} for row in shown}

    added = {row.name: {"": row.added_p50_ms or 0.0} for row in shown}
    panels = {
        "CPU µs per request": series("cpu_us_per_request"),
        "CPU µs per paced token": series("cpu_us_per_paced_token"),
        "added p50 at concurrency 1, ms": added,
    }
    grouped_bars(panels, title, out)
