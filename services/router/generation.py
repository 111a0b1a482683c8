"""What one request has become so far: the one mutable thing of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import SageError
from sagellm_common.core.telemetry import idle, span
from sagellm_common.core.types import GenerationOutput, GenerationRequest
from sagellm_common.rpc.progress import GenerationProgress
from sagellm_common.rpc.sessions import DecodeStep, FirstToken, HandedOver
from services.router.explain import Explanation
from services.router.stages import Pinned, Prefilled
from services.router.workers import WorkerLink


class Generation(GenerationProgress):
    """Progress, and with whom. `at_fault` is the worker whose call failed last; `traced`: somebody records spans."""

    def __init__(self, request: GenerationRequest, clock: Clock, explanation: Explanation) -> None:
        super().__init__(request, clock, explanation.add)
        self.explanation = explanation
        self.at_fault: WorkerLink | None = None
        self.traced = not idle()
        self.failure: BaseException | None = None
        """What the innermost stage failed with: it is that one's worker's, and those around it are only left."""
        self._pinned: Pinned | None = None
        self._pinned_until_s = 0.0

    @property
    def pinned(self) -> Pinned | None:
        """KV that nobody has pulled yet and whose lease still has time."""
        return self._pinned if self.clock.now() < self._pinned_until_s else None

    def unpin(self) -> None:
        """The KV is pulled, or not to be had."""
        self._pinned = None

    def stage(self, name: str, link: WorkerLink | None = None) -> AbstractContextManager[None]:
        """A span, an explain event and a time around one stage; a failure in it is the worker's."""
        return _Stage(self, name, link)

    def compare(self, expected_s: Sequence[tuple[str, float]], planned_s: float) -> None:
        """What a first token that is here was expected to take since `planned_s` of age, and what it would have taken
        elsewhere."""
        (worker_id, chosen_s), *others = expected_s
        took_s = self.age_s - planned_s
        detail = f"{worker_id}: {1e3 * chosen_s:.0f} ms expected, {1e3 * took_s:.0f} ms taken"
        if others:
            detail += "; expected " + ", ".join(f"{1e3 * seconds:.0f} ms on {name}" for name, seconds in others)
        self.record("first token", self._began_s + planned_s, took_s * 1e3, detail)

    def take_first_token(self, link: WorkerLink, token: FirstToken) -> GenerationOutput:
        """Its KV is still to be pinned there."""
        return self.first_token(link.worker_id, token)

    def take_prefill(self, prefilled: Prefilled) -> GenerationOutput | None:
        """The first token, unless it came before, or the end."""
        self.pin(prefilled.pinned)
        return self.prefilled(prefilled.worker.worker_id, prefilled.outcome)

    def take_step(self, link: WorkerLink, step: DecodeStep) -> GenerationOutput | None:
        """The step's tokens; None when it has none. Raises EngineFailed on a repeated or skipped index."""
        moved, model = self._pinned is not None and self._pinned.moved, link.record.model
        if step.transfer is not None or step.token_ids:
            self.unpin()
        block_size_tokens = model.kv_layout.block_size_tokens if model else 0
        return self.stepped(link.worker_id, step, block_size_tokens, moved=moved)

    def move(self, link: WorkerLink, handed_over: HandedOver, target: WorkerLink | None) -> None:
        """The decode worker has ended the generation, for `target` to go on with it; None: for whoever can."""
        self.moves += 1
        source = handed_over.source
        self.pin(Pinned(source, link, self.attempts, moved=True) if source else None)
        kv = f"KV of {source.num_tokens} tokens" if source else "no KV"
        whom = target.worker_id if target else "others"
        self.record("hand over", self.clock.now(), 0.0, f"{link.worker_id}: {kv} for {whom}")

    def pin(self, pinned: Pinned | None) -> None:
        """For the next attempt to pull."""
        self._pinned = pinned
        if pinned is not None:
            self._pinned_until_s = self.clock.now() + pinned.source.lease_expires_in_ms / 1e3


class _Stage:
    """A class, for a generator costs as much as the rest of it, and there are three until a request has a plan."""

    __slots__ = ("_begin_s", "_generation", "_link", "_name", "_span")

    def __init__(self, generation: Generation, name: str, link: WorkerLink | None) -> None:
        self._generation = generation
        self._name = name
        self._link = link
        self._span: AbstractContextManager[object] | None = None
        if generation.traced:
            worker_id = link.worker_id if link else ""
            self._span = span(name, request_id=generation.request.request_id, worker_id=worker_id)

    def __enter__(self) -> None:
        self._begin_s = self._generation.clock.now()
        if self._span is not None:
            self._span.__enter__()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        generation, begin_s = self._generation, self._begin_s
        if self._span is not None:
            self._span.__exit__(kind, err, tb)
        detail = self._link.worker_id if self._link else ""
        if isinstance(err, SageError) and err is not generation.failure:
            generation.at_fault, generation.failure = self._link, err
            detail = f"{detail}: {err.reason} {err.message}".removeprefix(": ")
        generation.record(self._name, begin_s, (generation.clock.now() - begin_s) * 1e3, detail)
