"""What one generation has become so far, as whoever emits its tokens keeps it: the router, or the client itself."""

from __future__ import annotations

from collections.abc import Callable

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import EngineFailed
from sagellm_common.core.types import (
    AT_HAND,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    GenerationSummary,
    TokenLogprob,
)
from sagellm_common.rpc.sessions import DecodeStep, FirstToken, PrefillOutcome, PromptKvReport, TransferReport

OnEvent = Callable[[str, float, float, str], None]
"""Takes one event: (stage, ms since the beginning, duration in ms, detail)."""


class GenerationProgress:
    """Counts tokens so that none is emitted twice or skipped, over any number of attempts, and keeps the times.

    `attempts` numbers the attempts on the wire; the `rejections` among them, by workers that are full or leave, are no
    failures, nor are `moves` from a worker that leaves.
    """

    def __init__(self, request: GenerationRequest, clock: Clock, on_event: OnEvent) -> None:
        self.request = request
        self.emitted: list[int] = []
        self.attempts = 0
        self.rejections = 0
        self.moves = 0
        self.clock = clock
        self._on_event = on_event
        self._began_s = clock.now()
        self._first_token_s: float | None = None
        self._last_token_s = self._began_s
        self._stage_ms: dict[str, float] = {}
        self._prefill: PrefillOutcome | None = None
        self._transfer: TransferReport | None = None
        self._decode_engine_ms = 0.0
        self._prompt_kv: PromptKvReport | None = None
        self._on_decode_tokens = 0
        self._prefill_worker_id = ""
        self._decode_worker_id = ""

    @property
    def complete(self) -> bool:
        """All tokens are there, only the word that it is finished got lost."""
        return len(self.emitted) >= self.request.sampling.max_new_tokens

    @property
    def age_s(self) -> float:
        """Since its beginning."""
        return self.clock.now() - self._began_s

    @property
    def transferring(self) -> bool:
        """Another worker has prefilled, and its KV has not arrived yet."""
        return self._prefill is not None and self._transfer is None

    def planned(self, attempt: int) -> None:
        """The next attempt has a route."""
        self.attempts = attempt
        self._transfer = None
        if attempt == 1:
            self._stage_ms["plan"] = self.age_s * 1e3

    def record(self, stage: str, begin_s: float, duration_ms: float, detail: str) -> None:
        """An event that began at `begin_s` of the clock."""
        self._stage_ms[stage] = self._stage_ms.get(stage, 0.0) + duration_ms
        self._on_event(stage, (begin_s - self._began_s) * 1e3, duration_ms, detail)

    def pulling_ahead(self, decode_id: str, source_id: str, num_blocks: int) -> None:
        """The decode worker begins to pull while the prefill worker computes."""
        detail = f"{decode_id}: {num_blocks} blocks of {source_id}, as they are computed"
        self.record("pull ahead", self.clock.now(), 0.0, detail)

    def first_token(self, worker_id: str, token: FirstToken) -> GenerationOutput:
        """Before the prefill worker's answer, which has it, too."""
        self._prefill_worker_id = worker_id
        return self._emit(token.token_ids, token.logprobs, None)

    def prefilled(self, worker_id: str, outcome: PrefillOutcome) -> GenerationOutput | None:
        """The first token, unless it was emitted already, or the end."""
        self._prefill, self._prefill_worker_id = outcome, worker_id
        self._explain_kv(worker_id, outcome)
        if self.emitted and outcome.finish_reason is None:
            return None
        return self._emit(outcome.token_ids, outcome.logprobs, outcome.finish_reason)

    def stepped(
        self, worker_id: str, step: DecodeStep, block_size_tokens: int, *, moved: bool = False
    ) -> GenerationOutput | None:
        """The step's tokens; None when it has none. Raises EngineFailed on a repeated or skipped index.

        `block_size_tokens` are those of the decode worker's blocks. `moved`: what it pulled is not the prompt's KV
        alone, but that of a generation that another worker has handed over.
        """
        self._decode_worker_id = worker_id
        self._decode_engine_ms += step.engine_ms
        if step.transfer is not None:
            self._take_transfer(step.transfer, block_size_tokens, moved)
        if step.prompt_kv is not None and not self.emitted:
            self._prompt_kv = step.prompt_kv
            self._on_decode_tokens = step.prompt_kv.cached_tokens - step.prompt_kv.store_tokens
            self._explain_kv(worker_id, step.prompt_kv)
        if step.token_ids and step.index != len(self.emitted):
            raise EngineFailed(f"decode worker {worker_id} sent token {step.index}, expected was {len(self.emitted)}")
        if not step.token_ids and step.finish_reason is None:
            return None
        return self._emit(step.token_ids, step.logprobs, step.finish_reason)

    def decoded(self, worker_id: str) -> None:
        """All tokens after the first are here."""
        began_s = self._began_s if self._first_token_s is None else self._first_token_s
        self.record("decode", began_s, (self.clock.now() - began_s) * 1e3, worker_id)

    def finish(self, reason: FinishReason) -> GenerationOutput:
        """The last output, without tokens."""
        return self._emit((), (), reason)

    def summary(self) -> GenerationSummary:
        transfer, prefill = self._transfer, self._prefill
        found = prefill or self._prompt_kv
        first_s = self._first_token_s if self._first_token_s is not None else self._last_token_s
        num_tokens = len(self.emitted)
        return GenerationSummary(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=num_tokens,
            cached_tokens=found.cached_tokens if found else 0,
            store_tokens=found.store_tokens if found else 0,
            decode_cached_tokens=self._on_decode_tokens,
            prefill_worker_id=self._prefill_worker_id,
            decode_worker_id=self._decode_worker_id,
            kv_bytes_transferred=transfer.bytes if transfer else 0,
            transport=transfer.backend if transfer else "",
            queue_ms=self._stage_ms.get("plan", 0.0) + (prefill.queue_ms if prefill else 0.0),
            reserve_ms=self._stage_ms.get("reserve", 0.0),
            prefill_ms=self._stage_ms.get("prefill", 0.0),
            prefill_compute_ms=prefill.compute_ms if prefill else 0.0,
            store_fetch_ms=found.store_fetch_ms if found else 0.0,
            store_conversion=found.store_conversion if found else None,
            origins=found.origins if found else AT_HAND,
            transfer_ms=transfer.transfer_ms if transfer else 0.0,
            kv_bytes_ahead=transfer.bytes_ahead if transfer else 0,
            transfer_exposed_ms=transfer.exposed_ms if transfer else 0.0,
            kv_conversion=transfer.conversion if transfer else None,
            prefill_engine_ms=prefill.engine_ms if prefill else 0.0,
            decode_engine_ms=self._decode_engine_ms,
            ttft_ms=(first_s - self._began_s) * 1e3,
            tpot_ms=(self._last_token_s - first_s) * 1e3 / max(1, num_tokens - 1),
            attempts=self.attempts - self.rejections - self.moves,
        )

    def _emit(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], finish_reason: FinishReason | None
    ) -> GenerationOutput:
        index = len(self.emitted)
        self.emitted += token_ids
        if token_ids:
            self._last_token_s = self.clock.now()
            if self._first_token_s is None:
                self._first_token_s = self._last_token_s
        return GenerationOutput(
            request_id=self.request.request_id,
            index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            summary=self.summary() if finish_reason else None,
        )

    def _explain_kv(self, worker_id: str, found: PrefillOutcome | PromptKvReport) -> None:
        """Where the worker that has completed the prompt had its KV from."""
        computed, own, host, peer, store, disk = found.origins.of(
            len(self.request.prompt_token_ids), found.cached_tokens, found.store_tokens
        )
        detail = f"{worker_id}: {computed} tokens computed, {own} in its cache"
        detail += f", {host} in its host memory" if host else ""
        detail += f", {peer} from another worker" if peer else ""
        detail += f", {store + disk} from the kv_store"
        detail += f" ({disk} of them from its disk)" if disk else ""
        if found.store_conversion:
            detail += f", {found.store_conversion.said('kept')}"
        self.record("prompt KV", self.clock.now(), 0.0, detail)

    def _take_transfer(self, transfer: TransferReport, block_size_tokens: int, moved: bool) -> None:
        """Pulled and committed. The span is entered afterwards, from the worker's report."""
        if not moved:
            self._transfer = transfer
            reused = transfer.blocks_reused * block_size_tokens
            self._on_decode_tokens = min(reused, len(self.request.prompt_token_ids))
        blocks = f"{transfer.blocks} blocks, {transfer.blocks_reused} reused"
        over = f"{transfer.backend} ({transfer.why})" if transfer.why else transfer.backend
        detail = f"{transfer.bytes} bytes, {blocks}, {over}"
        if transfer.began_ahead_ms:
            detail += f"; {transfer.bytes_ahead} of them before the first token, {transfer.exposed_ms:.1f} ms after it"
        if transfer.conversion:
            detail += f"; {transfer.conversion}"
        # From when the pull began, as far as the worker's times tell.
        began_s = self.clock.now() - (transfer.began_ahead_ms + transfer.exposed_ms) / 1e3
        self.record("transfer", began_s, transfer.transfer_ms, detail)
