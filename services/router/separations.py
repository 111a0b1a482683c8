"""To disaggregate or not, request by request: what was decided, and what came of it, for Prometheus and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from sagellm_common.scheduler_ir.pd_separation import Mode, PDSeparator, Separation

log = logging.getLogger(__name__)

WAYS = {True: "disaggregated", False: "aggregated"}


class Separations:
    """Also their Prometheus collector. Times are sums over the requests that costs decided and that have decoded."""

    def __init__(self, mode: Mode = "auto") -> None:
        self.separator = PDSeparator(mode)
        self._decided = dict.fromkeys(((way, by) for way in WAYS.values() for by in ("costs", "rule")), 0)
        self._compared = dict.fromkeys(WAYS.values(), 0)
        self._expected_s = dict.fromkeys(WAYS.values(), 0.0)
        self._other_s = dict.fromkeys(WAYS.values(), 0.0)
        self._taken_s = dict.fromkeys(WAYS.values(), 0.0)
        self._regret_s = dict.fromkeys(WAYS.values(), 0.0)

    def decided(self, separation: Separation) -> None:
        by = "rule" if separation.chosen is None else "costs"
        self._decided[WAYS[separation.disaggregate], by] += 1

    def took(self, request_id: str, separation: Separation, seconds: float) -> None:
        """From the plan until the second token; nothing to compare with where the rule decided."""
        if separation.chosen is None or separation.other is None:
            return
        way, regret_s = WAYS[separation.disaggregate], separation.regret_s(seconds)
        self._compared[way] += 1
        self._expected_s[way] += separation.chosen.total_s
        self._other_s[way] += separation.other.total_s
        self._taken_s[way] += seconds + separation.chosen.held_up_s
        self._regret_s[way] += regret_s
        self.separator.observe(separation, seconds)
        if log.isEnabledFor(logging.DEBUG):
            numbers = 1e3 * seconds, 1e3 * regret_s
            log.debug("request %s: %s; %.1f ms taken, regret %.1f ms", request_id, separation.reason, *numbers)

    # ---- Prometheus ----

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        decided = CounterMetricFamily(
            "sagellm_router_separations", "Requests by how they were served and what decided.", labels=["way", "by"]
        )
        for labels, count in self._decided.items():
            decided.add_metric(labels, count)
        yield decided
        sums: tuple[tuple[str, str, dict[str, float]], ...] = (
            ("compared", "Requests of which costs decided the way, and that have decoded.", {**self._compared}),
            ("expected_seconds", "What their way was expected to cost, delays of others included.", self._expected_s),
            ("taken_seconds", "What it cost.", self._taken_s),
            ("other_expected_seconds", "What the other way was expected to cost.", self._other_s),
            ("regret_seconds", "What the other way would have saved, by the model.", self._regret_s),
        )
        for name, text, values in sums:
            metric = CounterMetricFamily(f"sagellm_router_separation_{name}", text, labels=["way"])
            for way, value in values.items():
                metric.add_metric([way], value)
            yield metric
