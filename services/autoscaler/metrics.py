"""The autoscaler's Prometheus metrics."""

from __future__ import annotations

import math

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from services.autoscaler.planner import Decision, Fleet, Planner


class AutoscalerMetrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"sagellm_autoscaler_{name}", what, labels, registry=registry)

        self.workers = gauge("workers", "Workers that are wanted, asked for and ready", "phase", "state")
        self.demand = gauge(
            "demand", "Requests per second and their mean tokens, measured and expected", "what", "when"
        )
        self.forecast_error = gauge("forecast_error_ratio", "Of the forecasts, at their horizon", "what")
        self.rejected = gauge("rejected_ratio", "Share of the load beyond all workers that may be had")
        self.leading = gauge("leading", "1 while this replica decides")
        self.changes = Counter("sagellm_autoscaler_changes", "Scale changes", ["phase", "direction"], registry=registry)
        self.flips = Counter(
            "sagellm_autoscaler_role_changes", "Workers that were given another role", ["role"], registry=registry
        )
        self.failures = Counter(
            "sagellm_autoscaler_failures", "Looks after which nothing could be decided", ["reason"], registry=registry
        )

    def record(self, fleet: Fleet, decision: Decision, planner: Planner) -> None:
        for phase in ("prefill", "decode"):
            self.workers.labels(phase, "wanted").set(getattr(decision, phase))
            self.workers.labels(phase, "asked").set(getattr(fleet, phase))
            self.workers.labels(phase, "ready").set(getattr(fleet, f"{phase}_ready"))
        for when, demand in (("measured", decision.demand), ("expected", decision.expected)):
            for what in ("requests_per_s", "prompt_tokens", "computed_tokens", "output_tokens"):
                self.demand.labels(what, when).set(getattr(demand, what))
        for what, forecast in planner.forecasts.items():
            if not math.isnan(forecast.mape):
                self.forecast_error.labels(what).set(forecast.mape)
        self.rejected.set(decision.rejected_share)
