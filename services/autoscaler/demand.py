"""What the traffic of a while was, from the routers' counters: these only grow, except when a router restarts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one router since its start; `in_flight` is of now."""

    requests: float = 0.0
    rejected: float = 0.0
    prompt_tokens: float = 0.0
    kv_hit_tokens: float = 0.0
    generated_tokens: float = 0.0
    in_flight: float = 0.0

    def since(self, before: Counters) -> Counters:
        """What was counted after `before`. A counter that shrank was reset: all it has came since."""
        grown = {}
        for field in fields(Counters):
            now, then = getattr(self, field.name), getattr(before, field.name)
            grown[field.name] = now - then if now >= then else now
        grown["in_flight"] = self.in_flight
        return Counters(**grown)

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counters)))


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests per second, and their mean lengths in tokens. `computed_tokens`: of the prompt, what no cache had."""

    requests_per_s: float
    prompt_tokens: float
    computed_tokens: float
    output_tokens: float
    in_flight: float = 0.0


class Window:
    """Turns the counters of several routers, read again and again, into what came in between."""

    def __init__(self) -> None:
        self._last: dict[str, Counters] = {}

    def take(self, now: Mapping[str, Counters]) -> Counters:
        """By router. One that was not there before starts here: what it did before nobody was looking does not count.
        One that cannot be read is kept as it was: what it does meanwhile counts when it answers again."""
        total = Counters()
        for router, counters in now.items():
            before = self._last.get(router)
            total += counters.since(before if before is not None else counters)
            self._last[router] = counters
        return total


def demand_of(grown: Counters, seconds: float, before: Demand | None) -> Demand:
    """Of what was counted within `seconds`. With no finished request the lengths are as they were `before`."""
    finished = grown.requests - grown.rejected
    if finished <= 0 or grown.prompt_tokens <= 0:
        lengths = (before.prompt_tokens, before.computed_tokens, before.output_tokens) if before else (0.0, 0.0, 0.0)
    else:
        computed = max(0.0, grown.prompt_tokens - grown.kv_hit_tokens)
        lengths = (grown.prompt_tokens / finished, computed / finished, grown.generated_tokens / finished)
    return Demand(grown.requests / seconds, *lengths, in_flight=grown.in_flight)
