"""LMDeploy's engine with our loop: *admit → schedule → run → collect*, once per step.

Scheduler, cache, executor and model are LMDeploy's. Its own loop answers through per-request events which, on a CPU,
fire only once a sequence is done; ours hands over the outputs of all sequences after each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lmdeploy.pytorch.engine.engine import Engine as LmdeployEngineBase
from lmdeploy.pytorch.messages import MessageStatus

from sagellm_common.core.errors import EngineFailed, KvExhausted, LeaseExpired, SageError
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import FinishReason, KvLayout, TokenLogprob
from sagellm_common.engines.base import EngineRequest, SequenceOutput
from sagellm_common.engines.lmdeploy.kv_manager import EngineAllocation, LmdeployKvPool, SequencePrefix
from sagellm_common.engines.lmdeploy.progress import StepProgress
from sagellm_common.engines.lmdeploy.sampling import RowwiseSampling, lmdeploy_sampling, stopped

log = logging.getLogger(__name__)

BLOCKED_POLL_S = 0.02
"""How often a step is tried again while waiting sequences find no free blocks."""


@dataclass(slots=True)
class Running:
    """One submitted request and LMDeploy's sequence for it."""

    request: EngineRequest
    seq: Any
    stop_token_ids: frozenset[int]
    cancelled: bool = False

    def keeps_its_blocks(self) -> bool:
        """Whether it is computed in the blocks it came with; if not, its progress fails: others look at those."""
        given, progress = self.request.allocation, self.request.progress
        if not isinstance(given, EngineAllocation) or progress is None:
            return False
        blocks = self.seq.logical_blocks.get_real_blocks()[: len(given.logical)]
        if not np.array_equal(blocks, given.logical):
            progress.fail(LeaseExpired("the engine took this sequence's blocks back before it was computed"))
        return not progress.failed


class EngineCore(LmdeployEngineBase):
    """Lives on the engine's own thread and event loop; `add`, `cancel` and the pool are called from any thread."""

    def attach(
        self,
        layout: KvLayout,
        memory: KvMemory,
        *,
        prefix_caching: bool,
        eos_token_ids: frozenset[int],
        emit: Callable[[Sequence[SequenceOutput]], None],
    ) -> LmdeployKvPool:
        """Puts our KV manager in charge. Once, before `run`."""
        self.kv = LmdeployKvPool(self.scheduler, layout, memory, prefix_caching)
        self.kv.on_free(self.wake)
        agent = self.executor.model_agent
        self.progress = agent.progress = StepProgress()
        # Where layers are not apart in a block nobody asks for them; a device's may be told before they are written.
        apart = isinstance(memory, KvRegion) and bool(memory.layer_parts)
        self.tells_layers = apart and self.progress.follow_layers(agent.cache_engine.local_gpu_cache)
        self.sampling_strategy = RowwiseSampling(pad_token_id=0)
        self.steps = 0
        self._eos = eos_token_ids
        self._emit = emit
        self._running: dict[str, Running] = {}
        self._ended = False
        self._session_ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        return self.kv

    # ---- from any thread ----

    def add(self, request: EngineRequest) -> None:
        """Queues a request; takes over its allocation. Raises EngineFailed once the loop has ended."""
        emitted = request.num_emitted_tokens
        stop = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stop |= self._eos
        with self.kv.lock:
            if self._ended:
                raise EngineFailed("the engine was stopped; try another worker")
            session = self.scheduler.add_session(next(self._session_ids))
            prefix = SequencePrefix(self.kv.cache.root(request.cache_salt))
            self.kv.cache.prefixes[session.session_id] = prefix
            seq = session.add_sequence(
                request.token_ids.astype(np.int64), lmdeploy_sampling(request.sampling, emitted, stop)
            )
            self.scheduler.add_sequence(seq)
            if isinstance(request.allocation, EngineAllocation):
                prefix.hashes = list(request.allocation.hashes)
                cached = request.allocation.num_cached_tokens
                seq.logical_blocks.append(self.kv.take(request.allocation))
                seq.set_step(cached)
            self._running[request.request_id] = Running(request, seq, stop)
        self.wake()

    def knows(self, request_id: str) -> bool:
        return request_id in self._running

    def cancel(self, request_id: str) -> None:
        with self.kv.lock:
            run = self._running.get(request_id)
            if run is not None:
                run.cancelled = True
        self.wake()

    def counts(self) -> tuple[int, int]:
        """(running, waiting) sequences."""
        with self.kv.lock:
            return self.scheduler.num_running() + self.scheduler.num_locked(), self.scheduler.num_waiting()

    def wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the engine is gone
                self._loop.call_soon_threadsafe(self._wake.set)

    # ---- the loop ----

    async def run(self, stop: asyncio.Event) -> None:
        """Steps until `stop` is set. Whatever ends it, every sequence gets its last output."""
        self._loop = asyncio.get_running_loop()
        error: SageError | None = EngineFailed("the engine stopped; restart the worker, its log has the cause")
        try:
            await self._start_executor()
            await self._step_until(stop)
            error = None
        finally:
            reason = FinishReason.ERROR if error else FinishReason.CANCELLED
            with self.kv.lock:
                self._ended = True
                self._emit_all([self._end(run.seq, reason, error=error) for run in list(self._running.values())])
            self.progress.unfollow()
            self.executor.stop()
            self.executor.release()

    async def _step_until(self, stop: asyncio.Event) -> None:
        """A step that fails ends its own sequences with ENGINE_FAILED, not the engine."""
        while not stop.is_set():
            self._wake.clear()
            with self.kv.lock:
                self._emit_all(self._admit())
                step = self._schedule()
            if step is None:
                await self._idle()
                continue
            running = step.pop("running")
            runs = self._runs()
            self.executor.model_agent.abandoned = lambda step=[runs[seq.session_id] for seq in running]: all(
                run.cancelled for run in step
            )
            try:
                self.progress.begin_step(self._followed(running))
                output = await self._forward(step)
                with self.kv.lock:
                    outputs = self._collect(output, running, step["inputs"].is_decoding)
            except SageError as error:
                with self.kv.lock:
                    outputs = [self._end(seq, FinishReason.ERROR, error=error) for seq in running]
            self.progress.end_step()
            self.steps += 1
            self._emit_all(outputs)

    def _followed(self, running: list[Any]) -> list[KvProgress | None]:
        """What is to be told of each sequence's KV while it is computed; None: nothing."""
        by_session = {run.seq.session_id: run for run in self._running.values() if run.request.progress is not None}
        found: list[KvProgress | None] = []
        for seq in running if by_session else ():
            run = by_session.get(seq.session_id)
            found.append(run.request.progress if run is not None and run.keeps_its_blocks() else None)
        return found

    async def _idle(self) -> None:
        """Waits for work; when sequences wait for blocks, only a little."""
        timeout_s = BLOCKED_POLL_S if self.scheduler.has_unfinished() else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def _admit(self) -> list[SequenceOutput]:
        """Ends what was cancelled since the last step, and what LMDeploy gave up on."""
        ended = [self._end(run.seq, FinishReason.CANCELLED) for run in list(self._running.values()) if run.cancelled]
        aborted = list(self.scheduler.seq_manager.get_sequences(MessageStatus.ABORTED).values())
        full = KvExhausted("the sequence outgrew the KV cache; raise engine.num_blocks", retry_after_s=1.0)
        return ended + [self._end(seq, FinishReason.ERROR, error=full) for seq in aborted]

    def _schedule(self) -> dict[str, Any] | None:
        """A batch of new sequences as soon as there is room for one, else of running ones; None when nothing can run.

        LMDeploy's own rule lets up to three new ones wait for as long as half of the slots are taken.
        """
        step: dict[str, Any] | None = None
        if self.scheduler.has_waiting() and self.scheduler.num_running() < self.scheduler_config.max_batches:
            step = self._make_forward_inputs(True, enable_empty=True)
        if step is None and self.scheduler.has_running():
            step = self._make_forward_inputs(False)
        if step is not None:
            self.scheduler.lock_running(step["running"])
        return step

    async def _start_executor(self) -> None:
        """In a task of its own: on a failure LMDeploy's model agent cancels the task that started it."""

        async def start() -> None:
            self.executor.start(None)

        await asyncio.create_task(start())

    async def _forward(self, step: dict[str, Any]) -> Any:
        """Runs the batch. Raises EngineFailed when LMDeploy's model agent died of it; it is started again then."""
        agent = self.executor.model_agent
        await self.executor.forward_async(step)
        output = asyncio.ensure_future(self.executor.get_output_async())
        await asyncio.wait(
            {output, agent._background_task, agent._preprocess_task}, return_when=asyncio.FIRST_COMPLETED
        )
        if output.done():
            return output.result()
        output.cancel()
        log.error("an engine step failed; its %d sequences end", len(step["inputs"].seq_length))
        self.executor.stop()
        await self._start_executor()
        raise EngineFailed("the engine failed on this batch; see the worker's log")

    def _collect(self, output: Any, running: list[Any], is_decoding: bool) -> list[SequenceOutput]:
        """Publishes computed blocks, appends the new tokens, ends what is finished."""
        rows = list(zip(running, output.next_token_ids.tolist(), self._logprobs(output, running), strict=True))
        output.stopped = torch.tensor([stopped(seq, token) for seq, token, _ in rows])
        rows = [row for row in rows if row[0].status == MessageStatus.LOCKED]
        runs = self._runs()
        for seq, _, _ in rows:
            if runs[seq.session_id].cancelled:
                continue  # its step may have been abandoned half-way
            self.kv.cache.publish(
                self.kv.cache.prefixes[seq.session_id],
                seq.all_ids,
                seq.logical_blocks.get_real_blocks(),
                seq.num_valid_ids,
            )
        self.seq_strategy.update_running(running=running, batched_outputs=output, is_decoding=is_decoding)
        self.scheduler.unlock_running(running)
        outputs = []
        for seq, token, logprobs in rows:
            run = runs[seq.session_id]
            if run.cancelled:
                outputs.append(self._end(seq, FinishReason.CANCELLED))
            elif token in run.stop_token_ids and seq.status == MessageStatus.STOPPED:
                outputs.append(self._end(seq, FinishReason.STOP))
            elif seq.status == MessageStatus.STOPPED:
                outputs.append(self._end(seq, FinishReason.LENGTH, (token,), logprobs))
            else:
                outputs.append(SequenceOutput(run.request.request_id, (token,), logprobs))
        return outputs

    def _runs(self) -> dict[int, Running]:
        """By session id."""
        return {run.seq.session_id: run for run in self._running.values()}

    @staticmethod
    def _logprobs(output: Any, running: list[Any]) -> list[tuple[TokenLogprob, ...]]:
        if output.logprobs is None:
            return [()] * len(running)
        rows: list[tuple[TokenLogprob, ...]] = []
        for seq, values, ids in zip(
            running, output.logprobs.vals.tolist(), output.logprobs.indices.tolist(), strict=True
        ):
            count = seq.sampling_param.num_logprobs  # -1 is off; the first column is the sampled token
            top = slice(1, count + 1)
            rows.append((TokenLogprob(values[0], tuple(ids[top]), tuple(values[top])),) if count >= 0 else ())
        return rows

    def _end(
        self,
        seq: Any,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: SageError | None = None,
    ) -> SequenceOutput:
        """Frees a sequence, or holds its valid blocks for the caller; the lock is held."""
        run = next(r for r in self._running.values() if r.seq is seq)
        del self._running[run.request.request_id]
        held = None
        if run.request.hold_blocks and reason in (FinishReason.STOP, FinishReason.LENGTH):
            held = self.kv.hold(seq.logical_blocks.get_real_blocks(), seq.num_history_ids)
        self.kv.cache.prefixes.pop(seq.session_id)
        self.end_session(seq.session_id)
        return SequenceOutput(run.request.request_id, token_ids, logprobs, reason, error, held)

    def _emit_all(self, outputs: list[SequenceOutput]) -> None:
        if outputs:
            self._emit(outputs)
