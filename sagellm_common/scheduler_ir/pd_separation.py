"""Disaggregate or not, per request: what either way is expected to cost by the fitted cost model, in seconds.

    disaggregated   queue + compute on the prefill worker, KV on its way as far as it is not hidden behind that
    aggregated      queue + compute on the decode worker

Either way, whoever decodes where the prompt is computed is held up by it: each of them by `compute`. The sum over all
requests is what counts, this one's delay until it decodes and that of those it holds up (`Cost.total_s`). What the
model does not know of a way (calls, reservations, handshakes) is learned from how long it took: the mean difference.

The way not taken stays beside the one taken as its counterfactual; once the request decodes, `Separation.regret_s`
tells what the other way would have saved by the model. Before enough is learned, a fixed rule decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes
from sagellm_common.scheduler_ir.passes.prefill_chunking import chunk_tokens

if TYPE_CHECKING:  # strategies import this
    from sagellm_common.scheduler_ir.strategies.base import RequestView, WorkerView

Mode = Literal["auto", "always", "never"]

ENOUGH_SAMPLES = 20
"""Of prefill and of decode; before, a fit may still be anything."""
ENOUGH_TRANSFERS = 5
"""Of one link: it has two coefficients. Before, what was probed of it counts."""
SMOOTHING = 0.1
"""Weight of the latest request in what a way takes beyond the model."""
FORGETTING = 0.001
"""Share of the same that the other way loses with each request: what was bad for long not tried is tried again."""
WORTH = 0.9
"""Disaggregating has to save a tenth: of two uncertain costs the smaller one is likely to be underrated."""

STORED_PREFIX_REST_TOKENS = 32
"""So few tokens to compute hold up a decode worker's step hardly longer than its other sequences do."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one way to serve a request, expected, in seconds. `held_up_s` is the sum over those who decode where the
    prompt is computed, `beyond_s` what is not in the model."""

    worker_id: str
    queue_s: float
    compute_s: float
    transfer_s: float
    step_s: float
    held_up_s: float
    beyond_s: float

    @property
    def delay_s(self) -> float:
        """From the plan until the second token: it decodes."""
        return max(0.0, self.queue_s + self.compute_s + self.transfer_s + self.step_s + self.beyond_s)

    @property
    def total_s(self) -> float:
        return self.delay_s + self.held_up_s

    def __str__(self) -> str:
        parts = ("queue", self.queue_s), ("compute", self.compute_s), ("transfer", self.transfer_s)
        said = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts)
        return f"{1e3 * self.total_s:.1f} ms ({said}, others held up {1e3 * self.held_up_s:.1f})"


@dataclass(frozen=True, slots=True)
class Separation:
    """`rule` decided, or costs: those of the way that was `chosen` and of the `other`."""

    disaggregate: bool
    rule: str = ""
    chosen: Cost | None = None
    other: Cost | None = None

    @property
    def reason(self) -> str:
        """For people."""
        if self.chosen is None or self.other is None:
            return self.rule
        ways = ("disaggregated", "aggregated") if self.disaggregate else ("aggregated", "disaggregated")
        return f"{ways[0]}: {self.chosen} expected; {ways[1]} {self.other}"

    def regret_s(self, took_s: float) -> float:
        """What the other way would have saved, by the model, of what this one really took; 0 where it saves nothing."""
        if self.chosen is None or self.other is None:
            return 0.0
        return max(0.0, took_s + self.chosen.held_up_s - self.other.total_s)


class PDSeparator:
    """`mode` always: as placed; never: whoever decodes computes; auto: by costs, as placed while these are not known.

    Not thread-safe: it learns what each way takes beyond the model (`observe`).
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self._mode = mode
        self._beyond_s = {True: 0.0, False: 0.0}

    # ---- for strategies: is there anything to disaggregate ----

    def decide(self, request: RequestView, workers: Sequence[WorkerView], decode: WorkerView) -> Separation:
        """The rule: whenever somebody else than the decode worker serves prefill, and there is something to prefill.

        There is not when the kv_store holds nearly all of the prompt: then the decode worker fetches that, more than
        it holds itself, straight from there, instead of a prefill worker that would fetch it and hand it over.
        """
        stored = max((worker.matched_tokens for worker in workers if worker.role is WorkerRole.KV_STORE), default=0)
        rest = request.num_prompt_tokens - stored
        if stored > decode.matched_tokens and rest <= STORED_PREFIX_REST_TOKENS:
            return Separation(False, f"local prefill: the kv_store holds all but {rest} prompt tokens")
        if any(worker.prefills and worker.worker_id != decode.worker_id for worker in workers):
            return Separation(True, "disaggregated: prefill and decode workers are serving")
        return Separation(False, "local prefill: no prefill worker is serving")

    # ---- for plans: does it pay ----

    def split(self, graph: IRGraph, facts: Facts) -> IRGraph:
        """Each request that was placed on two workers on two or on one; `separations` says which and why.

        What was decided stays, and so does what was placed on one worker: there is no other way for it here.
        """
        requests, nodes = list(graph.requests), list(graph.nodes)
        separations = list(graph.separations)
        for i, request in enumerate(requests):
            if separations[i] is not None:
                continue
            found = separations[i] = self._choose(request, facts)
            if request.placement.prefill_worker_id is not None and not found.disaggregate:
                reason = f"{found.reason}; decode on {request.placement.decode_worker_id}"
                placement = replace(request.placement, prefill_worker_id=None, reason=reason)
                requests[i], nodes[i] = _on_one(replace(request, placement=placement), facts)
        return IRGraph(tuple(requests), tuple(nodes), tuple(separations))

    def _choose(self, request: IRRequest, facts: Facts) -> Separation:
        placement = request.placement
        prefill, decode = placement.prefill_worker_id, placement.decode_worker_id
        if prefill is None:
            return Separation(False, "placed on one worker")
        if request.num_emitted_tokens or request.kv_source_worker_id is not None:
            return Separation(True, "what was computed is not computed again")
        costs = facts.costs
        if self._mode == "never":
            return Separation(False, "aggregated: router.disaggregate is never")
        together = apart = None
        if costs is not None and min(costs.prefill.samples, costs.decode.samples) >= ENOUGH_SAMPLES:
            apart = self._apart(request, prefill, decode, costs, facts)
            together = self._on(decode, request, decode, costs, facts, beyond_s=self._beyond_s[False])
        if apart is None or together is None:
            return Separation(True, "disaggregated: as placed")
        if self._mode == "always" or apart.total_s <= WORTH * together.total_s:
            return Separation(True, "", apart, together)
        return Separation(False, "", together, apart)

    def _apart(self, request: IRRequest, prefill: str, decode: str, costs: CostModel, facts: Facts) -> Cost | None:
        """None: the link between them is not known."""
        cost = self._on(prefill, request, decode, costs, facts, beyond_s=self._beyond_s[True])
        if request.max_new_tokens == 1:  # the prefill worker makes it, nothing is moved
            return cost
        transfer_s = _transfer_s(request, prefill, decode, costs, facts)
        if transfer_s is None:
            return None
        # Layers cross while later ones are computed; the last one is left, and what the link has not managed.
        if facts.overlaps:
            transfer_s -= min(transfer_s * (1 - 1 / facts.num_layers), cost.compute_s)
        return Cost(prefill, cost.queue_s, cost.compute_s, transfer_s, cost.step_s, cost.held_up_s, cost.beyond_s)

    def _on(
        self, worker_id: str, request: IRRequest, decode: str, costs: CostModel, facts: Facts, *, beyond_s: float
    ) -> Cost:
        """With the prompt computed on this worker."""
        worker, step_s = facts.workers[worker_id], 0.0
        base_s, token_s, square_s = costs.prefill.coefficients
        prompt = request.prompt_tokens
        start = max(request.held_tokens(worker_id, worker.block_tokens), request.stored_tokens)
        start = min(start, prompt - 1)
        own_s = base_s + token_s * (prompt - start) + square_s * (prompt * prompt - start * start)
        queue_s = token_s * worker.queued_tokens + square_s * worker.queued_squares
        # Where it is computed in chunks, those who decode go in between.
        chunk = chunk_tokens(worker_id, start, prompt, facts) if worker.sequences else 0
        between_s = costs.decode.mean_s(worker.sequences, worker.context_tokens) / chunk if chunk else 0.0
        compute_s = own_s + between_s * max(0, prompt - start - chunk)
        queue_s += between_s * worker.queued_tokens
        if request.max_new_tokens > 1:
            there = facts.workers[decode]
            step_s = costs.decode.mean_s(there.sequences + 1, there.context_tokens + prompt)
        return Cost(worker_id, queue_s, compute_s, 0.0, step_s, worker.sequences * own_s, beyond_s)

    # ---- what it really took ----

    def observe(self, separation: Separation, took_s: float) -> None:
        """From the plan until the second token."""
        if separation.chosen is not None:
            way = separation.disaggregate
            expected_s = separation.chosen.delay_s - separation.chosen.beyond_s
            self._beyond_s[way] += SMOOTHING * (took_s - expected_s - self._beyond_s[way])
            self._beyond_s[not way] *= 1 - FORGETTING


def _transfer_s(request: IRRequest, prefill: str, decode: str, costs: CostModel, facts: Facts) -> float | None:
    """While its bytes move, by the transfers seen on this link, or what was probed of it, or else as on the others."""
    moved = request.prompt_tokens - request.held_tokens(decode, facts.workers[decode].block_tokens)
    fit = costs.links.get((prefill, decode))
    if fit is not None and fit.samples >= ENOUGH_TRANSFERS:
        return fit.seconds(1.0, moved * facts.kv_bytes_per_token)
    probed_s = request.view.pull_seconds(prefill, decode)
    if probed_s is not None:
        return probed_s * moved / request.prompt_tokens
    others = [fit for fit in costs.links.values() if fit.samples >= ENOUGH_TRANSFERS]
    return sum(fit.seconds(1.0, moved * facts.kv_bytes_per_token) for fit in others) / len(others) if others else None


def _on_one(request: IRRequest, facts: Facts) -> tuple[IRRequest, Nodes]:
    return request, IRBuilder(facts.workers).chain(request)
