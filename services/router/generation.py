"""What one request has become so far: the one mutable thing of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import EngineFailed, SageError
from sagellm_common.core.telemetry import span
from sagellm_common.core.types import (
    AT_HAND,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    GenerationSummary,
    KvSource,
    TokenLogprob,
)
from sagellm_common.rpc.sessions import DecodeStep, HandedOver, PrefillOutcome, PromptKvReport, TransferReport
from services.router.explain import Explanation, PlanEvent
from services.router.stages import Pinned, Prefilled
from services.router.workers import WorkerLink


class Generation:
    """Counts tokens so that none is emitted twice or skipped, over any number of attempts, and keeps the times.

    `attempts` numbers the attempts on the wire; the `rejections` among them, by workers that are full or leave, are no
    failures, nor are `moves` from a worker that leaves.
    `at_fault` is the worker whose call failed last.
    """

    def __init__(self, request: GenerationRequest, clock: Clock, explanation: Explanation) -> None:
        self.request = request
        self.explanation = explanation
        self.emitted: list[int] = []
        self.attempts = 0
        self.rejections = 0
        self.moves = 0
        self.at_fault: WorkerLink | None = None
        self._pinned: Pinned | None = None
        self._pinned_until_s = 0.0
        self._clock = clock
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
        """Since its admission."""
        return self._clock.now() - self._began_s

    @property
    def pinned(self) -> Pinned | None:
        """KV that nobody has pulled yet and whose lease still has time."""
        return self._pinned if self._clock.now() < self._pinned_until_s else None

    def unpin(self) -> None:
        """The KV is pulled, or not to be had."""
        self._pinned = None

    @contextmanager
    def stage(self, name: str, link: WorkerLink | None = None) -> Iterator[None]:
        """A span, an explain event and a time around one stage; a failure in it is the worker's."""
        begin_s = self._clock.now()
        detail = link.worker_id if link else ""
        try:
            with span(name, request_id=self.request.request_id, worker_id=detail):
                yield
        except SageError as err:
            self.at_fault = link
            detail = f"{detail}: {err.reason} {err.message}".removeprefix(": ")
            raise
        finally:
            self._record(name, begin_s, (self._clock.now() - begin_s) * 1e3, detail)

    def pulling_ahead(self, link: WorkerLink, source: KvSource) -> None:
        """The decode worker begins to pull while the prefill worker computes."""
        blocks = f"{len(source.block_table)} blocks of {source.worker_id}"
        self._record("pull ahead", self._clock.now(), 0.0, f"{link.worker_id}: {blocks}, as they are computed")

    def compare(self, expected_s: Sequence[tuple[str, float]], planned_s: float) -> None:
        """What a first token that is here was expected to take since `planned_s` of age, and what it would have taken
        elsewhere."""
        (worker_id, chosen_s), *others = expected_s
        took_s = self.age_s - planned_s
        detail = f"{worker_id}: {1e3 * chosen_s:.0f} ms expected, {1e3 * took_s:.0f} ms taken"
        if others:
            detail += "; expected " + ", ".join(f"{1e3 * seconds:.0f} ms on {name}" for name, seconds in others)
        self._record("first token", self._began_s + planned_s, took_s * 1e3, detail)

    def take_prefill(self, prefilled: Prefilled) -> GenerationOutput:
        """The first token, or the end."""
        outcome = prefilled.outcome
        self._prefill, self._prefill_worker_id = outcome, prefilled.worker.worker_id
        self._explain_kv(self._prefill_worker_id, outcome)
        self._pin(prefilled.pinned)
        return self._emit(outcome.token_ids, outcome.logprobs, outcome.finish_reason)

    def take_step(self, link: WorkerLink, step: DecodeStep) -> GenerationOutput | None:
        """The step's tokens; None when it has none. Raises EngineFailed on a repeated or skipped index."""
        self._decode_worker_id = link.worker_id
        self._decode_engine_ms += step.engine_ms
        if step.transfer is not None:
            self._take_transfer(link, step.transfer)
        if step.prompt_kv is not None and not self.emitted:
            self._prompt_kv = step.prompt_kv
            self._on_decode_tokens = step.prompt_kv.cached_tokens - step.prompt_kv.store_tokens
            self._explain_kv(link.worker_id, step.prompt_kv)
        if step.token_ids:
            self.unpin()
            if step.index != len(self.emitted):
                raise EngineFailed(
                    f"decode worker {link.worker_id} sent token {step.index}, expected was {len(self.emitted)}"
                )
        if not step.token_ids and step.finish_reason is None:
            return None
        return self._emit(step.token_ids, step.logprobs, step.finish_reason)

    def move(self, link: WorkerLink, handed_over: HandedOver, target: WorkerLink | None) -> None:
        """The decode worker has ended the generation, for `target` to go on with it; None: for whoever can."""
        self.moves += 1
        source = handed_over.source
        self._pin(Pinned(source, link, self.attempts, moved=True) if source else None)
        kv = f"KV of {source.num_tokens} tokens" if source else "no KV"
        whom = target.worker_id if target else "others"
        self._record("hand over", self._clock.now(), 0.0, f"{link.worker_id}: {kv} for {whom}")

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
            self._last_token_s = self._clock.now()
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

    def _pin(self, pinned: Pinned | None) -> None:
        self._pinned = pinned
        if pinned is not None:
            self._pinned_until_s = self._clock.now() + pinned.source.lease_expires_in_ms / 1e3

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
        self._record("prompt KV", self._clock.now(), 0.0, detail)

    def _take_transfer(self, link: WorkerLink, transfer: TransferReport) -> None:
        """Pulled and committed: the source is unpinned. The span is entered afterwards, from the worker's report."""
        if self._pinned is None or not self._pinned.moved:
            self._transfer = transfer
            if link.record.model is not None:
                reused = transfer.blocks_reused * link.record.model.kv_layout.block_size_tokens
                self._on_decode_tokens = min(reused, len(self.request.prompt_token_ids))
        self.unpin()
        blocks = f"{transfer.blocks} blocks, {transfer.blocks_reused} reused"
        over = f"{transfer.backend} ({transfer.why})" if transfer.why else transfer.backend
        detail = f"{transfer.bytes} bytes, {blocks}, {over}"
        if transfer.began_ahead_ms:
            detail += f"; {transfer.bytes_ahead} of them before the first token, {transfer.exposed_ms:.1f} ms after it"
        if transfer.conversion:
            detail += f"; {transfer.conversion}"
        # From when the pull began, as far as the worker's times tell.
        began_s = self._clock.now() - (transfer.began_ahead_ms + transfer.exposed_ms) / 1e3
        self._record("transfer", began_s, transfer.transfer_ms, detail)

    def _record(self, stage: str, begin_s: float, duration_ms: float, detail: str) -> None:
        self._stage_ms[stage] = self._stage_ms.get(stage, 0.0) + duration_ms
        self.explanation.add(PlanEvent(stage, (begin_s - self._began_s) * 1e3, duration_ms, detail))
