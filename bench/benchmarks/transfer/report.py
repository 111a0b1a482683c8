"""Tables, curves and targets of what was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.benchmarks.transfer.measure import KIB, MIB, Measured
from bench.benchmarks.transfer.pair import NO_DIGEST
from bench.plots import lines

HEADLINE_BYTES = 128 * MIB
"""Targets are about this payload, or the largest below it that was measured."""


@dataclass(frozen=True, slots=True)
class Target:
    what: str
    measured: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{'met   ' if self.met else 'MISSED'}  {self.what}: {self.measured:.2f}, target {sign} {self.bound:g}"


def targets(found: Measured) -> Iterator[Target]:
    """Ratios are medians over rounds, each of two contestants in the same round."""
    for path, peer, block_kib, bound in (
        ("shm", "plain gloo", 16, 5.0),
        ("shm", "plain mooncake", 16, 5.0),
        ("shm", "plain gloo", 256, 3.0),
        ("shm", "plain mooncake", 256, 3.0),
        ("shm", "memcpy", 16, 0.5),
        ("shm", "memcpy", 256, 0.5),
        ("tcp", "plain gloo", 16, 3.0),
        ("tcp", "plain mooncake", 16, 3.0),
        ("tcp", "plain gloo", 256, 1.4),
        ("tcp", "plain mooncake", 256, 2.0),
    ):
        ratio = faster(found, path, peer, block_kib * KIB)
        if ratio is not None:
            yield Target(f"{path} over {peer}, blocks of {block_kib} KiB", ratio, bound)
    for path, dead_s in found.dead_s.items():
        yield Target(f"{path}, a dead source noticed after, ms", 1e3 * max(dead_s), 50.0, at_most=True)
    for path, late_s in found.late_s.items():
        yield Target(f"{path}, a stopped source given up after its deadline, ms", 1e3 * max(late_s), 50.0, at_most=True)
    for path in ("shm", "tcp"):
        if path in found.ack_s:
            yield Target(
                f"{path}, 16 KiB to the ack, µs", 1e6 * statistics.median(found.ack_s[path]), 40.0, at_most=True
            )
        for block_kib in (16, 256):
            ratio = faster(found, path, path + NO_DIGEST, block_kib * KIB)
            if ratio is not None:
                yield Target(f"{path}, digest on over off, blocks of {block_kib} KiB", ratio, 0.85)


def faster(found: Measured, name: str, than: str, block_bytes: int) -> float | None:
    """How many times as fast, at the headline's payload; None where one of them was not measured."""
    payloads = [payload for payload, block in found.cells if block == block_bytes and payload <= HEADLINE_BYTES]
    cell = found.cells[max(payloads), block_bytes] if payloads else {}
    if name not in cell or than not in cell:
        return None
    pairs = zip(cell[name].seconds, cell[than].seconds, strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def rows(found: Measured) -> list[dict[str, Any]]:
    """A row per contestant and cell: medians, and the best GB/s."""
    return [
        {
            "payload_mib": payload / MIB,
            "block_kib": block / KIB,
            "path": name,
            "gb_per_s": payload / statistics.median(samples.seconds) / 1e9,
            "best_gb_per_s": payload / min(samples.seconds) / 1e9,
            "first_byte_us": 1e6 * statistics.median(samples.first_byte_s) if samples.first_byte_s else None,
            "cpu_s_per_gb": 1e9 * statistics.median(samples.cpu_s) / payload,
        }
        for (payload, block), cell in found.cells.items()
        for name, samples in cell.items()
        if samples.seconds
    ]


def table(found: Measured) -> str:
    """GB/s median (best), Markdown, a line per contestant; then CPU and latency."""
    cells = sorted(found.cells)
    names = list(dict.fromkeys(name for cell in found.cells.values() for name in cell))
    by_place = {(r["payload_mib"] * MIB, r["block_kib"] * KIB, r["path"]): r for r in rows(found)}

    def line(name: str, text: Any) -> str:
        values = [text(by_place[(*cell, name)]) if (*cell, name) in by_place else "–" for cell in cells]
        return f"| {name} | " + " | ".join(values) + " |"

    head = "| {} | " + " | ".join(f"{p // MIB}M/{b // KIB}K" for p, b in cells) + " |\n|" + "---|" * (len(cells) + 1)
    parts = [
        ("GB/s, median (best)", lambda r: f"{r['gb_per_s']:.2f} ({r['best_gb_per_s']:.2f})"),
        ("CPU seconds per GB, both processes", lambda r: f"{r['cpu_s_per_gb']:.2f}"),
        ("first byte, µs", lambda r: f"{r['first_byte_us']:.0f}" if r["first_byte_us"] else "–"),
    ]
    found_tables = ["\n".join([head.format(title), *(line(name, text) for name in names)]) for title, text in parts]
    acks = " · ".join(f"{name} {1e6 * statistics.median(s):.0f}" for name, s in found.ack_s.items())
    said = [f"One block of 16 KiB, asked for and here, µs: {acks}"] if acks else []
    for title, by_path in (
        ("A source that is killed within a pull is noticed after, ms", found.dead_s),
        ("A pull from a source that is stopped ends after its deadline, ms", found.late_s),
    ):
        if by_path:
            each = (
                f"{name} {1e3 * statistics.median(s):.1f} (at most {1e3 * max(s):.1f})" for name, s in by_path.items()
            )
            said.append(f"{title}: {' · '.join(each)}")
    return "\n\n".join([*found_tables, *said])


def document(found: Measured, conditions: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "conditions": dict(conditions),
        "missing": found.missing,
        "targets": [asdict(t) | {"met": t.met} for t in targets(found)],
        "rows": rows(found),
        "dead_ms": {name: [1e3 * s for s in seconds] for name, seconds in found.dead_s.items()},
        "late_ms": {name: [1e3 * s for s in seconds] for name, seconds in found.late_s.items()},
        "ack_us": {name: 1e6 * statistics.median(seconds) for name, seconds in found.ack_s.items()},
    }


def markdown(found: Measured, conditions: Mapping[str, Any], picture: str) -> str:
    said = ", ".join(f"{name} {value}" for name, value in conditions.items())
    missing = [f"- not measured: {name}: {reason}" for name, reason in found.missing.items()]
    checked = [f"- {target}" for target in targets(found)]
    head = ["# KV between two processes of one host", "", f"`sagellm bench transfer`: {said}.", ""]
    return "\n".join([*head, table(found), "", f"![curves]({picture})", "", *checked, *missing, ""])


def draw(found: Measured, picture: Path) -> None:
    """Curves over the payload for the smallest and the largest blocks; byte paths as they are used, digest on."""
    blocks = sorted({block for _, block in found.cells})
    panels: dict[str, dict[str, dict[float | str, float]]] = {}
    for block in dict.fromkeys((blocks[0], blocks[-1])):
        for title, key in (("GB/s", "gb_per_s"), ("CPU s per GB", "cpu_s_per_gb"), ("first byte, µs", "first_byte_us")):
            panel = panels.setdefault(f"{title}, blocks of {block // KIB} KiB", {})
            for row in rows(found):
                if row["block_kib"] * KIB == block and NO_DIGEST not in row["path"] and row[key] is not None:
                    panel.setdefault(row["path"], {})[f"{row['payload_mib']:.0f}M"] = row[key]
    lines(panels, "KV blocks, non-contiguous on both sides, between two processes", picture, columns=3)


def save(found: Measured, conditions: Mapping[str, Any], out: Path) -> list[Path]:
    """JSON at `out`; beside it Markdown and the curves."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document(found, conditions), indent=1))
    out.with_suffix(".md").write_text(markdown(found, conditions, out.with_suffix(".png").name))
    draw(found, out.with_suffix(".png"))
    return [out, out.with_suffix(".md"), out.with_suffix(".png")]
