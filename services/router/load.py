"""What this router has asked of a worker and is not done: what strategies place by, in tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self


@dataclass(slots=True)
class WorkerLoad:
    """Kept by the `Sent` of each attempt, at O(1) per request and per step of a request.

    `queued_squares` is Σ (end² − start²) of the queued prompt tokens [start, end). `sequences` decode on
    `context_tokens` of KV, or will once their prompts are computed; the latter are `coming`, too.
    """

    queued_prompts: int = 0
    queued_tokens: int = 0
    queued_squares: int = 0
    sequences: int = 0
    context_tokens: int = 0
    coming: int = 0
    coming_tokens: int = 0
    spells: int = field(default=0, compare=False)
    """How often a prompt came that found none queued."""

    @property
    def stepping(self) -> int:
        """Sequences that get tokens now."""
        return self.sequences - self.coming

    @property
    def stepping_tokens(self) -> int:
        """Their context."""
        return self.context_tokens - self.coming_tokens


@dataclass(slots=True)
class Sent:
    """One attempt's share of its workers' loads, for the time of a `with` block.

    Prompt tokens [start_token, prompt_tokens) are computed on `prefill`, if there is one. `context_tokens` are those
    that the first step on `decode` reads.
    """

    decode: WorkerLoad
    context_tokens: int
    prefill: WorkerLoad | None = None
    start_token: int = 0
    prompt_tokens: int = 0
    over: bool = field(default=False, init=False)
    _stepping: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        self._queue(1)
        self.decode.sequences += 1
        self.decode.coming += 1
        self.decode.context_tokens += self.context_tokens
        self.decode.coming_tokens += self.context_tokens
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.over = True
        self.prefilled()
        self._arrive()
        self.decode.sequences -= 1
        self.decode.context_tokens -= self.context_tokens

    def prefilled(self) -> None:
        """The prompt is computed. Idempotent."""
        self._queue(-1)
        self.prefill = None

    def step(self, num_tokens: int) -> None:
        """The sequence got so many tokens."""
        self._arrive()
        self.context_tokens += num_tokens
        self.decode.context_tokens += num_tokens

    def _arrive(self) -> None:
        if not self._stepping:
            self._stepping = True
            self.decode.coming -= 1
            self.decode.coming_tokens -= self.context_tokens

    def _queue(self, sign: int) -> None:
        if self.prefill is not None:
            start, end = self.start_token, self.prompt_tokens
            self.prefill.spells += sign > 0 and not self.prefill.queued_prompts
            self.prefill.queued_prompts += sign
            self.prefill.queued_tokens += sign * (end - start)
            self.prefill.queued_squares += sign * (end * end - start * start)
