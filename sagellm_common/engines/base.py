"""What a service needs of an inference engine. LMDeploy, vLLM and the simulated engine implement it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sagellm_common.core.errors import SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.step_costs import StepLog
from sagellm_common.core.types import FinishReason, ModelInfo, SamplingParams, TokenIds, TokenLogprob
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run.

    `token_ids` are all tokens known so far (prompt, then already emitted ones), the last `num_emitted_tokens` of them
    generated. `sampling.max_new_tokens` counts the emitted ones too. `allocation` holds KV of its first
    num_cached_tokens tokens (fewer than all); the engine computes the rest. With `submit` the engine owns it.
    With `hold_blocks` the blocks come back in the last output and the caller frees them.

    `progress` is kept up to date while the prompt's KV is computed into `allocation`'s blocks: by layer, by chunk or
    not at all, as the engine can. It fails when the engine computes into other blocks after all.
    The larger `priority` goes first where the engine can choose; after `timeout_s` nobody wants the answer. The first
    token is late after `first_token_within_s`, and the router expects the prompt to take `needed_s` alone: in LMDeploy,
    engine.policy orders by these.
    `chunk_tokens` of the prompt are computed at a time, and between them what is more urgent, and one token each of
    those who decode; 0: as it is configured, which is also the most. So far in LMDeploy only: vLLM chunks as it is
    configured.
    """

    request_id: str
    token_ids: TokenIds
    sampling: SamplingParams
    num_emitted_tokens: int = 0
    allocation: Allocation | None = None
    cache_salt: str = ""
    tenant: str = ""
    hold_blocks: bool = False
    progress: KvProgress | None = None
    priority: int = 0
    timeout_s: float = math.inf
    chunk_tokens: int = 0
    first_token_within_s: float = math.inf
    needed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One sequence's share of an engine step. A stop token ends the sequence and is not in `token_ids`.

    The last output of a sequence has finish_reason set; with ERROR also `error`. `held` then holds the blocks when
    they were asked for (`hold_blocks`, `Engine.take_out`): KV of `held.num_cached_tokens` tokens is valid.

    `engine_s` is what these tokens took in the engine, on its own thread's clock: a sequence's first ones since
    `submit`, later ones since their step began. The way to whoever gets them is not in it.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: SageError | None = None
    held: Allocation | None = None
    engine_s: float = 0.0


StepCallback = Callable[[Sequence[SequenceOutput]], None]
"""Called once per engine step with the outputs of all its sequences."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int
    waiting: int
    steps: int


class Engine(Protocol):
    """A continuously batching engine. It computes on threads of its own: no method waits for compute."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def description(self) -> str:
        """One line for people, once started: which engine, and what it lacks."""

    @property
    def kv(self) -> KVBackendProtocol: ...

    @property
    def step_log(self) -> StepLog:
        """What its last steps took. Empty where the engine does not tell: so far LMDeploy's does."""

    @property
    def ended(self) -> asyncio.Event:
        """Set once the engine computes no more, also when it failed: `stats` raises EngineFailed then."""

    async def start(self, on_step: StepCallback) -> None:
        """Loads the model and runs. `on_step` is called on the event loop that called `start`.

        Raises ConfigError for a missing or unsupported model or a wrong engine version.
        """

    def submit(self, request: EngineRequest) -> None:
        """Queues a sequence; its outputs come through `on_step`. Raises InvalidRequest, ContextTooLong."""

    def cancel(self, request_id: str) -> None:
        """Ends a sequence at the next step: one last output with CANCELLED. A no-op for an unknown one."""

    def take_out(self, request_id: str) -> None:
        """As `cancel`, once the step under way has given its token: the last output holds the sequence's blocks, if it
        has any, so that another engine can go on with them.
        """

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """Cancels everything and stops. Idempotent."""
