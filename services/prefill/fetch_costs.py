"""Whether KV is worth fetching, from kv_store or another worker, or sooner computed: by what all of these have taken on
this worker so far."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prometheus_client import Counter

from sagellm_common.core.types import KvLayout
from sagellm_common.kv_policy.cost_benefit import Choice, CostBenefitModel, RecomputeCost

log = logging.getLogger(__name__)

CHOICES = Counter("sagellm_prefill_store_choices", "Prompts fetched from kv_store or computed anew.", ["choice"])
SAVED_SECONDS = Counter("sagellm_prefill_store_saved_seconds", "By fetching, over computing as it was estimated.")
LOST_SECONDS = Counter("sagellm_prefill_store_lost_seconds", "By fetching what was computed sooner, as estimated.")
PEER_CHOICES = Counter(
    "sagellm_prefill_peer_choices", "Prompts fetched from another worker's cache or computed anew.", ["choice"]
)
PEER_SAVED_SECONDS = Counter("sagellm_prefill_peer_saved_seconds", "As from kv_store.")
PEER_LOST_SECONDS = Counter("sagellm_prefill_peer_lost_seconds", "As from kv_store.")

STORES = ""
"""The kv_stores, as one place to fetch from; each other worker is one by its id."""


class FetchCosts:
    """`always` has everything fetched, and learns all the same. `learned` hears of what computing costs."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        always: bool = False,
        learned: Callable[[RecomputeCost], None] = lambda cost: None,
    ) -> None:
        self._layout = layout
        self._always = always
        self._learned = learned
        self._model = CostBenefitModel()

    def worth_asking(self, request_id: str, begin_token: int, end_token: int, place: str = STORES) -> bool:
        """False where these tokens are computed sooner than fetched, even if all of them are there."""
        if self._always:
            return True
        verdict = self._model.choose(begin_token, end_token, self._num_bytes(begin_token, end_token), place)
        (PEER_CHOICES if place else CHOICES).labels(verdict.choice.value).inc()
        log.debug(
            "request %s: tokens %d to %d, %s: %s; computing is expected to take %s s, fetching %s s",
            request_id,
            begin_token,
            end_token,
            place or "kv_store",
            verdict.choice.value,
            verdict.recompute_s,
            verdict.fetch_s,
        )
        return verdict.choice is Choice.FETCH

    def fetched(self, begin_token: int, end_token: int, seconds: float, place: str = STORES) -> None:
        """Tokens came from there in so long, the asking included."""
        if end_token <= begin_token:
            return
        self._model.fetched(self._num_bytes(begin_token, end_token), seconds, place)
        recompute_s = self._model.recompute_s(begin_token, end_token)
        if recompute_s is not None:
            saved, lost = (PEER_SAVED_SECONDS, PEER_LOST_SECONDS) if place else (SAVED_SECONDS, LOST_SECONDS)
            (saved if recompute_s >= seconds else lost).inc(abs(recompute_s - seconds))

    def computed(self, begin_token: int, end_token: int, seconds: float) -> None:
        """The engine took so long for tokens [begin, end), its queue included: that, too, is what a fetch spares."""
        self._model.computed(begin_token, end_token, seconds)
        if (cost := self._model.recompute_cost()) is not None:
            self._learned(cost)

    def _num_bytes(self, begin_token: int, end_token: int) -> int:
        return (end_token - begin_token) // self._layout.block_size_tokens * self._layout.block_bytes
