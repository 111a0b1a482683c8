"""What the router measures of its workers, for the cost model: prefills, decode steps and transfers as they happen.

What comes from the workers' own clocks is taken from there. A queue is not in it: a prompt that waited for others
counts from when the last of those was done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sagellm_common.core.clock import Clock
from sagellm_common.rpc.sessions import PrefillOutcome, TransferReport
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.ir_types import PlanNode
from services.router.load import Sent
from services.router.workers import WorkerLink

STEPS_S = 0.05
"""Steps are timed over at least so long: one alone is no longer than the hiccups of the way here."""
PART_EVERY_S = 0.01
PART_AT_ONCE = 10
"""Each part of the model learns once in so long on average, for a sample takes it a third of a millisecond."""
TOGETHER_S = 0.002
"""Prompts whose answers are no further apart were computed in one step."""


@dataclass(slots=True)
class _Prefills:
    """Of one worker: when it was last done with one, and the step that may still get more prompts."""

    done_s: float
    chunks: list[tuple[int, int]]
    seconds: float


@dataclass(slots=True)
class _Steps:
    """Of one worker: steps as one of its sequences sees them. Costs are linear, so means of what they read will do."""

    of: Sent
    began_s: float
    steps: int = 0
    sequences: int = 0
    context_tokens: int = 0


class CostLearner:
    """Feeds `costs`; also their Prometheus collector."""

    def __init__(self, costs: CostModel, clock: Clock) -> None:
        self.costs = costs
        self._clock = clock
        self._prefills: WeakKeyDictionary[WorkerLink, _Prefills] = WeakKeyDictionary()
        self._steps: WeakKeyDictionary[WorkerLink, _Steps] = WeakKeyDictionary()
        self._paid_until_s: dict[str, float] = {}

    def needed_s(self, compute: PlanNode) -> float:
        """What a planned prefill is expected to take on a worker that does nothing else; 0: not known."""
        return self.costs.prefill_s([(compute.start_token, compute.end_token)]).seconds

    def prefilled(self, link: WorkerLink, prompt_tokens: int, outcome: PrefillOutcome) -> None:
        """Call it when the prompt is no longer counted in the worker's load."""
        now_s, last = self._clock.now(), self._prefills.get(link)
        seconds = (outcome.engine_ms or outcome.compute_ms) / 1e3
        chunk = (outcome.cached_tokens, prompt_tokens)
        if last is not None and last.chunks and now_s - last.done_s <= TOGETHER_S:
            last.chunks.append(chunk)
            last.done_s = now_s
        else:
            if last is not None:
                self._learn_prefill(last, now_s)
                seconds = min(seconds, now_s - last.done_s)
            last = self._prefills[link] = _Prefills(now_s, [chunk], seconds)
        if not link.work.queued_prompts:  # nobody else can have been in that step
            self._learn_prefill(last, now_s)

    def stepped(self, link: WorkerLink, sent: Sent, num_tokens: int) -> None:
        """One of its sequences has got tokens, by as many steps."""
        window = self._steps.get(link)
        if window is None or window.of.over:
            self._steps[link] = _Steps(sent, self._clock.now())
            return
        if window.of is not sent:
            return  # one of them tells it all
        window.steps += num_tokens
        window.sequences += num_tokens * link.work.stepping
        window.context_tokens += num_tokens * link.work.stepping_tokens
        now_s = self._clock.now()
        took_s, steps = now_s - window.began_s, window.steps
        if took_s < STEPS_S:
            return
        if self._due("decode", now_s):
            self.costs.observe_decode(
                round(window.sequences / steps), round(window.context_tokens / steps), took_s / steps
            )
        self._steps[link] = _Steps(sent, now_s)

    def transferred(self, source_id: str, target_id: str, transfer: TransferReport) -> None:
        if transfer.bytes and transfer.transfer_ms > 0 and self._due("transfer", self._clock.now()):
            self.costs.observe_transfer(source_id, target_id, transfer.bytes, transfer.transfer_ms / 1e3)

    def _learn_prefill(self, done: _Prefills, now_s: float) -> None:
        if done.chunks and done.seconds > 0 and self._due("prefill", now_s):
            self.costs.observe_prefill(done.chunks, done.seconds)
        done.chunks = []

    def _due(self, part: str, now_s: float) -> bool:
        paid_until_s = max(now_s, self._paid_until_s.get(part, now_s))
        if paid_until_s - now_s >= PART_AT_ONCE * PART_EVERY_S:
            return False
        self._paid_until_s[part] = paid_until_s + PART_EVERY_S
        return True

    # ---- Prometheus ----

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        parts = {
            "prefill": (self.costs.prefill.samples, self.costs.prefill.mape),
            "decode": (self.costs.decode.samples, self.costs.decode.mape),
            "transfer": _all_links(self.costs),
        }
        samples = CounterMetricFamily(
            "sagellm_router_cost_samples", "Samples the cost model has learned from.", labels=["part"]
        )
        mape = GaugeMetricFamily(
            "sagellm_router_cost_mape_ratio",
            "Mean absolute error of the cost model's predictions of the next sample, as a share of it.",
            labels=["part"],
        )
        for part, (count, error) in parts.items():
            samples.add_metric([part], count)
            mape.add_metric([part], error)
        yield samples
        yield mape


def _all_links(costs: CostModel) -> tuple[int, float]:
    """(samples, MAPE by their share of those)"""
    fits = [*costs.links.values()]
    known = [(fit.mape, fit.samples) for fit in fits if not math.isnan(fit.mape)]
    weight = sum(samples for _, samples in known)
    error = sum(mape * samples for mape, samples in known) / weight if weight else math.nan
    return sum(fit.samples for fit in fits), error
