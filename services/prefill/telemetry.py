"""What prefill tells about itself, as a wrapper: the loop knows nothing of it."""

from __future__ import annotations

import asyncio

from prometheus_client import Counter, Histogram

from sagellm_common.comm_backend.handoff import Party
from sagellm_common.core.errors import SageError
from sagellm_common.core.telemetry import span
from services.prefill.jobs import Prefill, PrefillDone, PrefillJob

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

REQUESTS = Counter("sagellm_prefill_requests", "Prefills by outcome: done or the error's reason.", ["outcome"])
TOKENS = Counter("sagellm_prefill_tokens", "Prompt tokens by where their KV came from.", ["origin"])
COMPUTE_SECONDS = Histogram("sagellm_prefill_compute_seconds", "From submit to the first token.", buckets=_SECONDS)
STORE_FETCH_SECONDS = Histogram("sagellm_prefill_store_fetch_seconds", "Asking kv_store and pulling.", buckets=_SECONDS)

# Looked up once: they stand between the first token and the wire.
_DONE = REQUESTS.labels("done")
_ORIGINS = [TOKENS.labels(origin) for origin in ("computed", "cache", "host", "peer", "store", "store_disk")]
"""As `KvOrigins.of` has them."""


class ObservedPrefill:
    """A `Prefill` with a span and metrics."""

    def __init__(self, inner: Prefill) -> None:
        self._inner = inner

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        with span(
            "prefill",
            job.trace_context,
            request_id=job.request_id,
            attempt=job.attempt,
            prompt_tokens=len(job.prompt),
        ) as current:
            try:
                done = await self._inner.prefill(job)
            except SageError as err:
                REQUESTS.labels(err.reason.lower()).inc()
                raise
            except asyncio.CancelledError:
                REQUESTS.labels("cancelled").inc()
                raise
            current.set_attributes({"cached_tokens": done.cached_tokens, "store_tokens": done.store_tokens})
        _DONE.inc()
        origins = done.origins.of(len(job.prompt), done.cached_tokens, done.store_tokens)
        for counter, tokens in zip(_ORIGINS, origins, strict=True):
            counter.inc(tokens)
        COMPUTE_SECONDS.observe(done.compute_ms / 1e3)
        STORE_FETCH_SECONDS.observe(done.store_fetch_ms / 1e3)
        return done

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        self._inner.cancel(request_id, attempt, by)
