"""What the router hears and measures of its workers, for the cost model: steps and transfers as they happen.

An engine that tells what its steps took is believed. Of others it is the router that sees how long prompts and tokens
take; while prompts queue, how long several of them do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sagellm_common.core.clock import Clock
from sagellm_common.core.step_costs import StepCost
from sagellm_common.rpc.sessions import TransferReport
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.ir_types import IRNode
from services.router.held import PromptComputed
from services.router.load import Sent
from services.router.workers import WorkerLink

STEPS_S = 0.05
STEPS = 8
"""Steps are timed over so long, or so many where the sequence ends: one alone is no longer than the way's hiccups."""
PART_EVERY_S = 0.01
PART_AT_ONCE = 10
"""Each part of the model learns once in so long on average, for a sample takes it a third of a millisecond."""
BUSY_S = 0.25
"""Prompts of a queue are timed together, over so long where it lasts: one answer may come late, or with others."""


@dataclass(slots=True)
class _Queue:
    """Of one worker, within one spell of never being without a prompt: what it has computed since `began_s`."""

    spell: int
    began_s: float
    chunks: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Steps:
    """Of one worker: steps as one of its sequences sees them. Costs are linear, so means of what they read will do."""

    of: Sent
    began_s: float
    last_s: float
    steps: int = 0
    sequences: int = 0
    context_tokens: int = 0


class CostLearner:
    """Feeds `costs`; also their Prometheus collector."""

    def __init__(self, costs: CostModel, clock: Clock) -> None:
        self.costs = costs
        self.active = True
        """Whether it learns: that is work, for nobody where no strategy asks."""
        self._clock = clock
        self._queues: WeakKeyDictionary[WorkerLink, _Queue] = WeakKeyDictionary()
        self._steps: WeakKeyDictionary[WorkerLink, _Steps] = WeakKeyDictionary()
        self._paid_until_s: dict[str, float] = {}
        self._telling: WeakSet[WorkerLink] = WeakSet()

    def needed_s(self, compute: IRNode) -> float:
        """What a planned prefill is expected to take on a worker that does nothing else; 0: not known."""
        return self.costs.prefill_s([(compute.start_token, compute.end_token)]).seconds

    def told(self, link: WorkerLink, steps: Sequence[StepCost]) -> None:
        """By its engine."""
        if not self.active:
            return
        self._telling.add(link)
        now_s = self._clock.now()
        for step in steps:
            if self._due("prefill" if step.prompts else "decode", now_s):
                self.costs.observe_step(step)

    def prefilled(self, link: WorkerLink, prompt_tokens: int, outcome: PromptComputed) -> None:
        """Call it when the prompt is no longer counted in the worker's load."""
        if not self.active or link in self._telling:
            return
        now_s, spell, queue = self._clock.now(), link.work.spells, self._queues.pop(link, None)
        if queue is not None and queue.spell != spell:
            queue = None  # it ended unheard: its last prompts failed
        chunk, others = (outcome.cached_tokens, prompt_tokens), link.work.queued_prompts
        if queue is None and not others:  # it was alone there: the engine's own time is all its own
            self._learn_prefill([chunk], (outcome.engine_ms or outcome.compute_ms) / 1e3, now_s)
        elif queue is None:  # nobody knows what others had a part in its time
            self._queues[link] = _Queue(spell, now_s)
        else:
            queue.chunks.append(chunk)
            took_s = now_s - queue.began_s
            if took_s >= (BUSY_S if others else STEPS_S):
                self._learn_prefill(queue.chunks, took_s, now_s)
                queue = _Queue(spell, now_s)
            if others:
                self._queues[link] = queue

    def stepped(self, link: WorkerLink, sent: Sent, num_tokens: int) -> None:
        """One of its sequences has got tokens, by as many steps."""
        if not self.active or link in self._telling:
            return
        if link.work.queued_prompts:  # a prompt is computed in between: that is no step of theirs
            self._steps.pop(link, None)
            return
        window, now_s = self._steps.get(link), self._clock.now()
        if window is None or window.of.over:
            if window is not None and window.steps >= STEPS:
                self._learn_decode(window, window.last_s)
            self._steps[link] = _Steps(sent, now_s, now_s)
            return
        if window.of is not sent:
            return  # one of them tells it all
        window.last_s = now_s
        window.steps += num_tokens
        window.sequences += num_tokens * link.work.stepping
        window.context_tokens += num_tokens * link.work.stepping_tokens
        if now_s - window.began_s >= STEPS_S:
            self._learn_decode(window, now_s)
            self._steps[link] = _Steps(sent, now_s, now_s)

    def decoded(self, link: WorkerLink, sent: Sent, num_tokens: int, tpot_s: float) -> None:
        """A sequence of which only its end was heard: its steps, taken as of its mean length, and of the load now."""
        steps, now_s = num_tokens - 1, self._clock.now()
        if link in self._telling or steps < STEPS or tpot_s <= 0 or not self._due("decode", now_s):
            return
        others = max(0, link.work.sequences - 1)
        context_tokens = sent.context_tokens + num_tokens // 2 + max(0, link.work.context_tokens - sent.context_tokens)
        self.costs.observe_decode(1 + others, context_tokens, tpot_s)

    def transferred(self, source_id: str, target_id: str, transfer: TransferReport) -> None:
        if self.active and transfer.bytes and transfer.transfer_ms > 0 and self._due("transfer", self._clock.now()):
            self.costs.observe_transfer(source_id, target_id, transfer.bytes, transfer.transfer_ms / 1e3)

    def _learn_prefill(self, chunks: list[tuple[int, int]], seconds: float, now_s: float) -> None:
        if seconds > 0 and self._due("prefill", now_s):
            self.costs.observe_prefill(chunks, seconds, steps=len(chunks))

    def _learn_decode(self, window: _Steps, until_s: float) -> None:
        steps, took_s = window.steps, until_s - window.began_s
        if took_s > 0 and self._due("decode", until_s):
            self.costs.observe_decode(
                round(window.sequences / steps), round(window.context_tokens / steps), took_s / steps
            )

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
