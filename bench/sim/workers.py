"""Engines on the virtual clock: prefill in chunked batches, decode in continuous batches.

A decode batch is advanced in closed form from one change of its members to the next: k steps of B sequences cost
k·(a + c·B) + b·(k·context + B·k·(k−1)/2) seconds, so a million requests need no event per token.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.sim.clock import VirtualClock
from bench.sim.kv import SimKv
from bench.sim.profile import Profile
from bench.sim.traces import SimRequest
from sagellm_common.scheduler_ir.engine_policy import EnginePolicy, SequenceView


def step_seconds(profile: Profile, sequences: int, context_tokens: int) -> float:
    a, b, c = profile.decode_costs(sequences)
    return a + b * context_tokens + c * sequences


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


class PrefillSim:
    """Computes the waiting prompts in the engine policy's order, `prefill_chunk_tokens` a step."""

    def __init__(
        self,
        name: str,
        clock: VirtualClock,
        profile: Profile,
        kv: SimKv,
        policy: EnginePolicy,
        on_step: Callable[[list[tuple[int, int]], float], None],
        *,
        in_order: bool,
    ) -> None:
        """`on_step(chunks, seconds)` tells what a step computed and cost."""
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
        self._in_order = in_order
        """The policy leaves arrivals in their order: no need to ask."""
        self._waiting: deque[tuple[Job, Callable[[float], None]]] = deque()
        self._stepping = False

    def submit(self, job: Job, on_done: Callable[[float], None]) -> None:
        """`on_done(seconds of the last step)` when the whole prompt is computed. Blocks are taken until then."""
        self.outstanding += 1
        self.assigned += 1
        self._count(job, 1)
        self._waiting.append((job, on_done))
        if not self._stepping:
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
        chunks = []
        while self._waiting and room > 0:
            job = self._waiting[0][0]
            start = job.computed_tokens
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
        self.busy_s += seconds
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


class DecodeSim:
    """Continuous batching: who comes joins at the end of the step under way, `max_batch` at most run at once.

    A prompt computed elsewhere lacks the KV of its first token: those that join together have it computed in a step of
    their own, a prefill of one token each, which gives their second. The others wait for it.
    """

    def __init__(self, name: str, clock: VirtualClock, profile: Profile, kv: SimKv) -> None:
        self.name = name
        self.kv = kv
        self.outstanding = 0
        self.assigned = 0
        self.context_tokens = 0
        self.busy_s = 0.0
        self._clock = clock
        self._profile = profile
        self._running: list[tuple[int, int, Job, Callable[[], None]]] = []
        """Heap by the step at whose end the sequence is done."""
        self._waiting: deque[tuple[Job, Callable[[], None]]] = deque()
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

    @property
    def sequences(self) -> int:
        return len(self._running) + len(self._waiting)

    def submit(self, job: Job, on_done: Callable[[], None]) -> None:
        """Its KV is here, and its first token was sent. `on_done` after the last token."""
        self._advance(self._clock.now_s)
        self._waiting.append((job, on_done))
        self._replan()

    def stall(self, seconds: float) -> float:
        """The worker computes something else for so long, a prompt, in between two steps. Returns when that is done."""
        self._advance(self._clock.now_s)
        self._since_s = max(self._since_s, self._clock.now_s) + seconds
        self.busy_s += seconds
        ready_s = self._since_s
        self._replan()
        return ready_s

    def _advance(self, now_s: float) -> None:
        """Does the steps that have begun by now: the last of them may end later."""
        if not self._running:
            self._since_s = max(self._since_s, now_s)
            return
        last = self._running[0][0]
        steps = min(self._steps_within(now_s - self._since_s), last - self._steps)
        if steps > 0:
            self._run(steps)

    def _run(self, steps: int) -> None:
        seconds, batch = self._seconds(steps), len(self._running)
        self._since_s += seconds
        self.busy_s += seconds
        self._steps += steps
        self.context_tokens += steps * batch

    def _seconds(self, steps: int) -> float:
        a, b, c = self._costs
        batch = len(self._running)
        return steps * (a + c * batch) + b * (steps * self.context_tokens + batch * steps * (steps - 1) / 2)

    def _steps_within(self, seconds: float) -> int:
        """Fewest steps that last at least so long; 0 for a moment before the next step begins."""
        if seconds <= 0:
            return 0
        a, b, c = self._costs
        batch = len(self._running)
        linear = a + c * batch + b * self.context_tokens - b * batch / 2
        square = b * batch / 2
        root = math.sqrt(linear * linear + 4 * square * seconds)
        return math.ceil(2 * seconds / (linear + root) - 1e-9)  # of the two forms, the one that divides by no zero

    def _replan(self) -> None:
        """Lets waiting sequences in at the step boundary, and plans the next end of a sequence."""
        while self._waiting and len(self._running) < self._profile.max_batch:
            job, on_done = self._waiting.popleft()
            output, made = job.request.output_tokens, 1
            if job.prefill_worker and output > 1:
                self._join(job.request.prompt_tokens)
                made = 2
            heapq.heappush(self._running, (self._steps + output - made, next(self._numbers), job, on_done))
            self.context_tokens += job.request.prompt_tokens + made
        self._costs = self._profile.decode_costs(len(self._running))
        self._plan += 1
        if self._running:
            plan, steps = self._plan, self._running[0][0] - self._steps
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
        self._run(self._running[0][0] - self._steps)
        done = []
        while self._running and self._running[0][0] <= self._steps:
            _, _, job, on_done = heapq.heappop(self._running)
            self.context_tokens -= job.request.prompt_tokens + job.request.output_tokens
            done.append(on_done)
        self._replan()
        for on_done in done:
            on_done()
