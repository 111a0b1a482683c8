"""How far a simulated distribution is from the measured one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = np.linspace(0.05, 0.95, 19)
TARGET = 0.15


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one metric, in ms. `distribution_error`: the mean distance of the quantiles 5 % to 95 %, as a share of the
    measured mean (Wasserstein's distance, without the tails, normalised); errors of percentiles as shares of these."""

    metric: str
    measured_p50_ms: float
    simulated_p50_ms: float
    p50_error: float
    measured_p95_ms: float
    simulated_p95_ms: float
    p95_error: float
    distribution_error: float

    @property
    def worst(self) -> float:
        return max(self.p50_error, self.p95_error, self.distribution_error)


def distance(metric: str, measured_s: Sequence[float], simulated_s: Sequence[float]) -> Distance:
    """Raises ValueError where there is nothing to compare."""
    if not measured_s or not simulated_s:
        raise ValueError(f"{metric}: {len(measured_s)} measured and {len(simulated_s)} simulated values")
    measured, simulated = (1e3 * np.asarray(values) for values in (measured_s, simulated_s))
    (m50, m95), (s50, s95) = (np.quantile(values, (0.5, 0.95)) for values in (measured, simulated))
    apart = np.abs(np.quantile(measured, QUANTILES) - np.quantile(simulated, QUANTILES))
    return Distance(
        metric,
        measured_p50_ms=float(m50),
        simulated_p50_ms=float(s50),
        p50_error=float(abs(s50 - m50) / m50),
        measured_p95_ms=float(m95),
        simulated_p95_ms=float(s95),
        p95_error=float(abs(s95 - m95) / m95),
        distribution_error=float(apart.mean() / measured.mean()),
    )
