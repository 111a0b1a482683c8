"""The gateway's Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from sagellm_common.core.clock import Clock

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

REQUESTS = Counter("sagellm_gateway_requests", "HTTP requests answered; 499: the client left.", ["route", "code"])
DURATION = Histogram(
    "sagellm_gateway_request_duration_seconds", "From headers to last byte.", ["route"], buckets=_LATENCY_BUCKETS
)
TTFT = Histogram("sagellm_gateway_ttft_seconds", "Request to first token, per generation.", buckets=_LATENCY_BUCKETS)
TPOT = Histogram(
    "sagellm_gateway_tpot_seconds",
    "Mean time per token after the first, per generation.",
    buckets=_LATENCY_BUCKETS,
)
PROMPT_TOKENS = Counter("sagellm_gateway_prompt_tokens", "Prompt tokens of the generations started.")
COMPLETION_TOKENS = Counter("sagellm_gateway_completion_tokens", "Tokens generated.")


@dataclass(slots=True)
class TokenTimer:
    """Times the tokens of one generation, which was asked for at `start_s` of `clock`."""

    clock: Clock
    start_s: float
    num_tokens: int = 0
    _first_s: float = 0.0
    _last_s: float = 0.0

    def tokens(self, count: int) -> None:
        """`count` tokens have come."""
        if not count:
            return
        self._last_s = self.clock.now()
        if not self.num_tokens:
            self._first_s = self._last_s
            TTFT.observe(self._first_s - self.start_s)
        self.num_tokens += count
        COMPLETION_TOKENS.inc(count)

    def done(self) -> None:
        if self.num_tokens > 1:
            TPOT.observe((self._last_s - self._first_s) / (self.num_tokens - 1))
