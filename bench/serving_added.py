"""What the gRPC path adds to one request alone, beside the engine and the transfer of that very request.

    client: first token after ──────── TTFT ────────┤           client: a token every ── TPOT ──┤
    engine: submit ── prefill ── its thread has it                engine: step ── its thread has it
                                                   added = the rest: client, router, sessions, queues, thread to thread

Requests go one by one, in turns with a bare engine in the bench's process, so that the difference to that one can stand
beside it. This difference holds whatever else the two engines do not share: caches, memory, a step that waited for the
interpreter or a core; between processes it drifts by more than the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.paired import Estimate, added, estimate, in_turns
from bench.plots import grouped_bars
from bench.serving_runs import Run, Sample


@dataclass(frozen=True, slots=True)
class Added:
    """Of one of a client's times, in ms. `added`: seen − engine − transfer, request by request.

    `difference`: seen minus what a client of the bare engine sees (`bare`), whose own share is `bare_engine`.
    """

    seen: Estimate
    engine: Estimate
    transfer: Estimate
    added: Estimate
    bare: Estimate
    bare_engine: Estimate
    difference: Estimate
    target: float

    @property
    def verdict(self) -> str:
        return self.added.verdict(self.target)


@dataclass(frozen=True, slots=True)
class Part:
    """One of a client's times: what it saw, what its engine took, how long its KV travelled."""

    seen: Callable[[Sample], float]
    engine: Callable[[Sample], float]
    transfer: Callable[[Sample], float]
    target: float


PARTS: Mapping[str, Part] = {
    # The first token leaves before the KV does.
    "first token": Part(lambda s: s.ttft_ms, lambda s: s.engine_first_ms, lambda s: 0.0, target=3.0),
    "per token": Part(lambda s: s.tpot_ms, lambda s: s.engine_step_ms, lambda s: s.transfer_ms, target=0.3),
}


async def added_by_grpc(
    engine: Run, over: Run, prompt: Callable[[], list[int]], new_tokens: int, turns: int
) -> dict[str, Added]:
    bare, through = await in_turns(lambda: engine(prompt(), new_tokens), lambda: over(prompt(), new_tokens), turns)
    return {name: _added(part, bare, through) for name, part in PARTS.items()}


def _added(part: Part, bare: list[Sample], through: list[Sample]) -> Added:
    seen, base = [part.seen(s) for s in through], [part.seen(s) for s in bare]
    return Added(
        seen=estimate(seen),
        engine=estimate([part.engine(s) for s in through]),
        transfer=estimate([part.transfer(s) for s in through]),
        added=estimate([part.seen(s) - part.engine(s) - part.transfer(s) for s in through]),
        bare=estimate(base),
        bare_engine=estimate([part.engine(s) for s in bare]),
        difference=estimate(added(base, seen)),
        target=part.target,
    )


def rows(found: Mapping[str, Mapping[str, Added]]) -> list[list[str]]:
    """A table of {model: {part: …}}; medians, with intervals where something is held against them."""
    header = [
        *("model", "ms", "client sees", "its engine took", "its KV moved for", "added: the rest [95 %]", "target", ""),
        *("in process: client sees", "engine took", "difference [95 %]"),
    ]
    lines = [header]
    for model, parts in found.items():
        for name, one in parts.items():
            middles = [f"{e.value:.2f}" for e in (one.seen, one.engine, one.transfer)]
            held = [_span(one.added), f"≤ {one.target}", one.verdict.partition(":")[0]]
            base = [f"{e.value:.2f}" for e in (one.bare, one.bare_engine)]
            lines.append([model, name, *middles, *held, *base, _span(one.difference)])
    return lines


def _span(value: Estimate) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def as_json(found: Mapping[str, Mapping[str, Added]]) -> dict[str, Any]:
    return {
        model: {name: {**asdict(one), "verdict": one.verdict} for name, one in parts.items()}
        for model, parts in found.items()
    }


def draw(found: Mapping[str, Mapping[str, Any]], picture: Path) -> None:
    """Of `as_json`."""
    panels = {
        f"{name} (ms)": {
            "added beyond its own engine and transfer": {
                model: parts[name]["added"]["value"] for model, parts in found.items()
            },
            "difference to an engine in process": {
                model: parts[name]["difference"]["value"] for model, parts in found.items()
            },
            "target": {model: parts[name]["target"] for model, parts in found.items()},
        }
        for name in PARTS
    }
    grouped_bars(panels, "What the gRPC path adds to one request alone; the target is for the first bar", picture)
