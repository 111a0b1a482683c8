"""Engines on the virtual clock: prefill in chunked batches, decode in continuous batches.

A decode batch is advanced in closed form from one change of its members to the next: k steps of B sequences cost
k·(a + c·B) + b·(k·context + B·k·(k−1)/2) seconds, so a million requests need no event per token.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.sim.clock import VirtualClock
from bench.sim.kv import SimKv
from bench.sim.profile import Profile
from bench.sim.traces import SimRequest
from sagellm_common.scheduler_ir.engine_policy import EnginePolicy, SequenceView
from sagellm_common.scheduler_ir.pd_separation import Separation


def step_seconds(profile: Profile, sequences: int, context_tokens: int) -> float:
    a, b, c = profile.decode_costs(sequences)
    return a + b * context_tokens + c * sequences


def _nobody(worker: object) -> None:
    pass


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the cluster. Times are on the virtual clock, NaN until they are known."""

    request: SimRequest
    view: SequenceView
    prefill_hit_tokens: int = 0
    decode_hit_tokens: int = 0
    computed_tokens: int = 0
    """Of the prompt, the cached ones included."""
    first_token_s: float = math.nan
    end_s: float = math.nan
    rejected: str = ""
    late: bool = False
    """Its first token cannot come within its target: it gives way, and is not counted as queued."""
    reserved_blocks: int = 0
    decode_worker: str = ""
    prefill_worker: str = ""
    separation: Separation | None = None
    """Until the second token: there may be a million jobs."""
    planned_s: float = math.nan
    regret_s: float = 0.0
    """What the other way, to disaggregate or not, would have saved by the cost model."""

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_token_s) / max(1, self.request.output_tokens - 1)


class PrefillSim:
    """Computes the waiting prompts in the engine policy's order, as our engine does: together as many whole ones as
    `prefill_chunk_tokens` hold; one that is longer alone, so many tokens a step, and between its steps who comes first.
    """

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        profile: Profile,
        kv: SimKv,
        policy: EnginePolicy,
        on_step: Callable[[list[tuple[int, int]], float], None],
        rng: random.Random,
        *,
        in_order: bool,
    ) -> None:
        """`on_step(chunks, seconds)` tells what a step computed and cost. `rng` draws of the profile's noise."""
        self.name = name
        self.kv = kv
        self.outstanding = 0
        self.assigned = 0
        self.queued_tokens = 0
        self.queued_squares = 0
        self.busy_s = 0.0
        self._clock = clock
        self._profile = profile
        self._policy = policy
        self._on_step = on_step
        self._rng = rng
        self._in_order = in_order
        """The policy leaves arrivals in their order: no need to ask."""
        self.on_load: Callable[[PrefillSim], None] = _nobody
        """Called when what is queued here has changed."""
        self._waiting: deque[tuple[Job, Callable[[float], None]]] = deque()
        self._stepping = False

    def submit(self, job: Job, on_done: Callable[[float], None]) -> None:
        """`on_done(seconds of the last step)` when the whole prompt is computed. Blocks are taken until then."""
        self.outstanding += 1
        self.assigned += 1
        self._count(job, 1)
        self._waiting.append((job, on_done))
        if self._stepping:
            self.on_load(self)
        else:
            self._step()

    def _step(self) -> None:
        if not self._waiting:
            self._stepping = False
            return
        self._stepping = True
        if not self._in_order and len(self._waiting) > 1:
            self._reorder()
        a, b, c = self._profile.prefill
        room, seconds, done = self._profile.prefill_chunk_tokens, a, list[tuple[Job, Callable[[float], None]]]()
        chunks: list[tuple[int, int]] = []
        while self._waiting:
            job = self._waiting[0][0]
            start, alone = job.computed_tokens, job.computed_tokens > job.prefill_hit_tokens
            if chunks and (alone or job.request.prompt_tokens - start > room):
                break
            end = min(job.request.prompt_tokens, start + room)
            self._count(job, -1)
            job.computed_tokens = end
            room -= end - start
            chunks.append((start, end))
            seconds += b * (end - start) + c * (end * end - start * start)
            if end < job.request.prompt_tokens:
                self._count(job, 1)
                break
            done.append(self._waiting.popleft())
            if alone:
                break
        if self._profile.prefill_noise:
            seconds *= self._rng.choice(self._profile.prefill_noise)
        self.busy_s += seconds
        self.on_load(self)
        self._on_step(chunks, seconds)
        self._clock.at(self._clock.now_s + seconds, lambda: self._finish(done, seconds))

    def _finish(self, done: list[tuple[Job, Callable[[float], None]]], seconds: float) -> None:
        for _, on_done in done:
            self.outstanding -= 1
            on_done(seconds)
        self._step()

    def _reorder(self) -> None:
        by_id = {job.view.request_id: (job, on_done) for job, on_done in self._waiting}
        ordered = self._policy.order_waiting([job.view for job, _ in self._waiting], self._clock.now_s)
        self._waiting = deque(by_id[view.request_id] for view in ordered)

    def _count(self, job: Job, sign: int) -> None:
        if job.late:
            return
        start, end = job.computed_tokens, job.request.prompt_tokens
        self.queued_tokens += sign * (end - start)
        self.queued_squares += sign * (end * end - start * start)


@dataclass(slots=True, eq=False)
class _Prompt:
    """One to be computed between the steps of those who decode, `tokens` at a time, `left` times more."""

    job: Job
    chunk_tokens: int
    on_done: Callable[[], None]
    tokens: float = 0.0
    left: int = 0
    computed: float = 0.0

    def divide(self, most_tokens: int) -> None:
        """What is left of it, in chunks of equal size."""
        rest = self.job.request.prompt_tokens - self.computed
        self.left = max(1, math.ceil(rest / most_tokens - 1e-9))
        self.tokens = rest / self.left


class DecodeSim:
    """Continuous batching: who comes joins at the end of the step under way, `max_batch` at most run at once.

    A prompt computed elsewhere lacks the KV of its first token: those that join together have it computed in a step of
    their own, a prefill of one token each, which gives their second. The others wait for it. With each step goes a
    chunk of the first of the prompts that are to be computed here.
    """

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        profile: Profile,
        kv: SimKv,
        policy: EnginePolicy | None = None,
    ) -> None:
        """`policy` None: prompts are computed as they came."""
        self.name = name
        self.kv = kv
        self.outstanding = 0
        self.assigned = 0
        self.context_tokens = 0
        self.coming = 0
        self.coming_tokens = 0
        self.busy_s = 0.0
        self._clock = clock
        self._profile = profile
        self._policy = policy
        self._running: list[tuple[int, int, Job, Callable[[], None]]] = []
        """Heap by the step at whose end the sequence is done."""
        self._waiting: deque[tuple[Job, Callable[[], None]]] = deque()
        self._prompts: list[_Prompt] = []
        """The first of them is being computed."""
        self._numbers = itertools.count()
        self._steps = 0
        self._since_s = 0.0
        """When step number `_steps` began, or will begin."""
        self._plan = 0
        """Number of the event that is planned; older ones are out of date."""
        self._costs = profile.decode
        """Of a step of as many sequences as run."""
        self._joins_at_s = -math.inf
        """When the newest step of those who join begins."""
        self.on_load: Callable[[DecodeSim], None] = _nobody
        """Called when what decodes here has changed."""

    @property
    def sequences(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Of prompts that are to be computed here, the late ones left out."""
        return round(sum(p.job.request.prompt_tokens - p.computed for p in self._prompts if not p.job.late))

    @property
    def queued_squares(self) -> int:
        queued = (p for p in self._prompts if not p.job.late)
        return round(sum(p.job.request.prompt_tokens**2 - p.computed**2 for p in queued))

    def expect(self, job: Job, sign: int) -> None:
        """It will decode here once its prompt is computed; or does so now. Late ones come when there is time."""
        if not job.late:
            self.coming += sign
            self.coming_tokens += sign * job.request.prompt_tokens
            self.on_load(self)

    def submit(self, job: Job, on_done: Callable[[], None]) -> None:
        """Its KV is here, and its first token was sent. `on_done` after the last token."""
        self._advance(self._clock.now_s)
        self._waiting.append((job, on_done))
        self._replan()

    def compute(self, job: Job, chunk_tokens: int, on_done: Callable[[], None]) -> None:
        """Its prompt, from `computed_tokens` on, by so many with each step (0: all); `on_done` at its first token."""
        self._advance(self._clock.now_s)
        prompt = _Prompt(job, chunk_tokens, on_done, computed=job.computed_tokens)
        self._prompts.append(prompt)
        self._order_prompts()
        self._replan()

    def _order_prompts(self) -> None:
        """Between two chunks those go first whom the engine's policy puts first."""
        if self._policy is not None and len(self._prompts) > 1:
            by_id = {prompt.job.view.request_id: prompt for prompt in self._prompts}
            ordered = self._policy.order_waiting([p.job.view for p in self._prompts], self._clock.now_s)
            self._prompts = [by_id[view.request_id] for view in ordered]

    def _advance(self, now_s: float) -> None:
        """Does the steps that have begun by now: the last of them may end later."""
        if not self._running and not self._prompts:
            self._since_s = max(self._since_s, now_s)
            return
        steps = min(self._steps_within(now_s - self._since_s), self._until_change())
        if steps > 0:
            self._run(steps)

    def _until_change(self) -> int:
        """Steps until the first sequence or the first prompt is done."""
        sequences = (ends_at - self._steps for ends_at, *_ in self._running[:1])
        return min([*sequences, *(prompt.left for prompt in self._prompts[:1])])

    def _run(self, steps: int) -> None:
        seconds = self._seconds(steps)
        self._since_s += seconds
        self.busy_s += seconds
        self._steps += steps
        self.context_tokens += steps * len(self._running)
        for prompt in self._prompts[:1]:
            prompt.left -= steps
            prompt.computed += steps * prompt.tokens

    def _cost(self) -> tuple[float, float]:
        """(seconds of the next step, how much longer each one after it is)"""
        batch, first_s, more_s = len(self._running), 0.0, 0.0
        if batch:
            a, b, c = self._costs
            first_s, more_s = a + b * self.context_tokens + c * batch, b * batch
        for prompt in self._prompts[:1]:
            a, b, c = self._profile.prefill
            tokens, end = prompt.tokens, prompt.computed + prompt.tokens
            first_s += a + b * tokens + c * (end * end - prompt.computed * prompt.computed)
            more_s += 2 * c * tokens * tokens
        return first_s, more_s

    def _seconds(self, steps: int) -> float:
        first_s, more_s = self._cost()
        return steps * first_s + more_s * steps * (steps - 1) / 2

    def _steps_within(self, seconds: float) -> int:
        """Fewest steps that last at least so long; 0 for a moment before the next step begins."""
        if seconds <= 0:
            return 0
        first_s, more_s = self._cost()
        linear, square = first_s - more_s / 2, more_s / 2
        root = math.sqrt(linear * linear + 4 * square * seconds)
        return math.ceil(2 * seconds / (linear + root) - 1e-9)  # of the two forms, the one that divides by no zero

    def _replan(self) -> None:
        """Lets waiting sequences in at the step boundary, and plans the next end of a sequence or of a prompt."""
        while self._waiting and len(self._running) < self._profile.max_batch:
            job, on_done = self._waiting.popleft()
            output, made = job.request.output_tokens, 1
            if job.prefill_worker and output > 1:
                self._join(job.request.prompt_tokens)
                made = 2
            heapq.heappush(self._running, (self._steps + output - made, next(self._numbers), job, on_done))
            self.context_tokens += job.request.prompt_tokens + made
        self._costs = self._profile.decode_costs(len(self._running))
        for prompt in self._prompts[:1]:
            chunk, most = prompt.chunk_tokens, prompt.job.request.prompt_tokens
            # Nobody who decodes has to wait: as many as fit into a step.
            prompt.divide(chunk or most if self._running else self._profile.prefill_chunk_tokens)
        self.on_load(self)
        self._plan += 1
        if self._running or self._prompts:
            plan, steps = self._plan, self._until_change()
            self._clock.at(self._since_s + self._seconds(steps), lambda: self._end(plan))

    def _join(self, prompt_tokens: int) -> None:
        """One more token in the step of those who join, which begins at the next boundary."""
        a, b, c = self._profile.prefill
        seconds = b + c * (2 * prompt_tokens + 1)
        if self._joins_at_s < self._clock.now_s:
            self._joins_at_s = self._since_s
            seconds += a
        self._since_s += seconds
        self.busy_s += seconds

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._run(self._until_change())
        done = []
        while self._running and self._running[0][0] <= self._steps:
            _, _, job, on_done = heapq.heappop(self._running)
            self.context_tokens -= job.request.prompt_tokens + job.request.output_tokens
            done.append(on_done)
        if self._prompts and not self._prompts[0].left:
            done.append(self._prompts.pop(0).on_done)
            self._order_prompts()
        self._replan()
        for on_done in done:
            on_done()
