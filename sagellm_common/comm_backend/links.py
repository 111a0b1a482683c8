"""What the links to this worker cost, learnt from the transfers themselves and from probes.

A transfer of x bytes takes y = latency_s + x / bytes_per_s. Transfers are kept by size, a smoothed time for each power
of two: many small ones say nothing of the bandwidth, and must not displace the few that do. The line through them is
the one of least squares, of relative errors.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from sagellm_common.core.topology import LinkCost

SMOOTHING = 0.3
"""Weight of the latest transfer among those of its size."""
TELLING_BYTES = 256 << 10
ASSUMED_BYTES_PER_S = 1e9
"""A bandwidth, as long as nothing of TELLING_BYTES or more has crossed: small transfers tell the latency only."""
SMALL_BYTES, LARGE_BYTES = 4 << 10, 64 << 20
"""Sizes at which costs are compared and a probe's are written down."""


@dataclass(slots=True)
class LinkFit:
    """The line through the transfers over one link; `times` has (bytes, seconds) by power of two."""

    samples: int = 0
    times: dict[int, tuple[float, float]] = field(default_factory=dict)
    _fitted: tuple[float, float] | None = None
    """(latency, seconds per byte), until another transfer changes it."""

    def observe(self, num_bytes: int, seconds: float) -> None:
        """One transfer of at least a byte, in more than no time."""
        self.samples += 1
        size, took_s = self.times.get(num_bytes.bit_length(), (num_bytes, seconds))
        smoothed = size + SMOOTHING * (num_bytes - size), took_s + SMOOTHING * (seconds - took_s)
        self.times[num_bytes.bit_length()] = smoothed
        self._fitted = None

    @property
    def latency_s(self) -> float:
        return self._line()[0]

    @property
    def bytes_per_s(self) -> float:
        return 1 / self._line()[1]

    def _line(self) -> tuple[float, float]:
        """Not sooner than somebody asks: most transfers are over before."""
        if self._fitted is None:
            self._fitted = _line(list(self.times.values()))
        return self._fitted


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(y at 0, slope) of the line through the points that has the least relative errors; y is at least 0 there, and
    the slope above 0: where the points say otherwise, the fastest of them is all bytes and no latency."""
    if max(x for x, _ in points) < TELLING_BYTES:
        beyond_s = [y - x / ASSUMED_BYTES_PER_S for x, y in points]
        if min(beyond_s) > 0:
            return sum(beyond_s) / len(beyond_s), 1 / ASSUMED_BYTES_PER_S
    weights = [1 / y**2 for _, y in points]
    weight = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / weight
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / weight
    xx = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    xy = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    if xx > 0 and 0 < xy / xx <= mean_y / mean_x:
        return mean_y - xy / xx * mean_x, xy / xx
    if xx > 0 and xy > 0:  # it would meet zero bytes below zero seconds
        through_zero = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
        return 0.0, through_zero / sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    return 0.0, min(y / x for x, y in points)


@dataclass(slots=True)
class _Link:
    fit: LinkFit
    per_message_s: float = 0.0
    measured_at_s: float = 0.0


class LinkTable:
    """Costs of the links to one worker, by source and byte path. Thread-safe. `now_s` is Unix time."""

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], _Link] = {}

    def observe(self, source_id: str, backend: str, num_bytes: int, seconds: float) -> None:
        """One transfer. Of nothing, or in no time at all, it teaches nothing."""
        if num_bytes <= 0 or seconds <= 0:
            return
        with self._lock:
            link = self._links.setdefault((source_id, backend), _Link(LinkFit()))
            link.fit.observe(num_bytes, seconds)
            link.measured_at_s = self._now_s()

    def set_probed(self, source_id: str, backend: str, costs: LinkCost) -> None:
        """A probe measured the link anew: what older transfers said is forgotten."""
        with self._lock:
            # Two transfers that lie on the probe's line, for later ones to move.
            fit = LinkFit()
            for num_bytes in (SMALL_BYTES, LARGE_BYTES):
                fit.observe(num_bytes, costs.seconds(num_bytes))
            fit.samples = costs.samples
            self._links[source_id, backend] = _Link(fit, costs.per_message_s, self._now_s())

    def find(self, source_id: str, backend: str) -> LinkCost | None:
        """From this source over this byte path; None: nothing is known. `target_id` is left empty."""
        with self._lock:
            link = self._links.get((source_id, backend))
            return _cost(source_id, backend, link) if link else None

    def all(self) -> list[LinkCost]:
        with self._lock:
            return [_cost(*key, link) for key, link in sorted(self._links.items(), key=lambda item: item[0])]

    def keep(self, source_ids: Iterable[str]) -> None:
        """Forgets the links from all others."""
        known = set(source_ids)
        with self._lock:
            self._links = {key: link for key, link in self._links.items() if key[0] in known}


def _cost(source_id: str, backend: str, link: _Link) -> LinkCost:
    fit = link.fit
    return LinkCost(
        source_id,
        "",
        backend,
        fit.latency_s,
        fit.bytes_per_s,
        link.per_message_s,
        link.measured_at_s,
        fit.samples,
    )


def best_per_source(links: Iterable[LinkCost], num_bytes: int = 1 << 20) -> list[LinkCost]:
    """Of each source the byte path that moves num_bytes soonest."""
    best: dict[str, LinkCost] = {}
    for link in links:
        known = best.get(link.source_id)
        if known is None or link.seconds(num_bytes) < known.seconds(num_bytes):
            best[link.source_id] = link
    return list(best.values())


def changed_noticeably(before: LinkCost | None, now: LinkCost, share: float = 0.2) -> bool:
    """Whether others should hear of it: another byte path, or a cost that moved by more than `share`."""
    if before is None or before.backend != now.backend:
        return True
    sizes = (SMALL_BYTES, LARGE_BYTES)
    return any(abs(now.seconds(size) - before.seconds(size)) > share * before.seconds(size) for size in sizes)


def to_target(link: LinkCost, target_id: str) -> LinkCost:
    return replace(link, target_id=target_id)
