"""LMDeploy's engine with our loop: *admit → schedule → run → collect*, once per step.

Scheduler, executor and model are LMDeploy's; blocks, prefix cache, eviction and order are ours, inside that scheduler.
Its own loop answers through per-request events which, on a CPU, fire only once a sequence is done; ours hands over the
outputs of all sequences after each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lmdeploy.pytorch.engine.engine import Engine as LmdeployEngineBase
from lmdeploy.pytorch.engine.model_agent import BatchedOutputs
from lmdeploy.pytorch.messages import MessageStatus, UpdateTokenMode

from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import ConfigError, EngineFailed, KvExhausted, LeaseExpired, SageError
from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.step_costs import StepCost, StepLog
from sagellm_common.core.types import FinishReason, KvLayout, TokenLogprob
from sagellm_common.engines.base import EngineRequest, SequenceOutput
from sagellm_common.engines.lmdeploy import hooks
from sagellm_common.engines.lmdeploy.block_manager import manager_of
from sagellm_common.engines.lmdeploy.kv_manager import LmdeployKvPool, SequencePrefix
from sagellm_common.engines.lmdeploy.progress import StepProgress
from sagellm_common.engines.lmdeploy.sampling import RowwiseSampling, lmdeploy_sampling, stopped
from sagellm_common.engines.lmdeploy.scheduler import POLICY, Steering
from sagellm_common.engines.watchdog import StepWatch
from sagellm_common.kv_runtime.pool import PoolAllocation
from sagellm_common.scheduler_ir.engine_policy import EnginePolicy, StepPlan

if TYPE_CHECKING:
    from sagellm_common.engines.lmdeploy.kernels.direct import DecodeInputs, DirectDecode

log = logging.getLogger(__name__)

FAILED = "the engine failed on this request; see the worker's log"
BLOCKED_POLL_S = 0.02
"""How often a step is tried again while waiting sequences find no free blocks."""


def _now() -> tuple[float, float]:
    """Of the wall's clock, and of this thread's on a core."""
    return time.monotonic(), time.thread_time()


@dataclass(slots=True)
class Running:
    """One submitted request and LMDeploy's sequence for it."""

    request: EngineRequest
    seq: Any
    stop_token_ids: frozenset[int]
    submitted_s: float | None
    """Until its first tokens."""
    cancelled: bool = False
    taken_out: bool = False

    def keeps_its_blocks(self) -> bool:
        """Whether it is computed in the blocks it came with; if not, its progress fails: others look at those."""
        given, progress = self.request.allocation, self.request.progress
        if not isinstance(given, PoolAllocation) or progress is None:
            return False
        blocks = self.seq.logical_blocks.get_real_blocks()[: len(given.table)]
        if not np.array_equal(blocks, given.table):
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
        eviction: str,
        tenants: Mapping[str, TenantConfig],
        tells_layers: bool,
        direct: DirectDecode | None,
        watch: StepWatch,
        step_log: StepLog,
        on_cpu: bool,
        policy: EnginePolicy,
        eos_token_ids: frozenset[int],
        emit: Callable[[Sequence[SequenceOutput]], None],
    ) -> LmdeployKvPool:
        """Puts our KV manager and policy in charge. Once, before `run`. `tells_layers`: the model itself does.

        `direct` takes the decode steps that it can.
        """
        manager = manager_of(self.scheduler)
        self.kv = LmdeployKvPool(manager, self.scheduler, layout, memory, prefix_caching, eviction, tenants=tenants)
        self.kv.on_free(self.wake)
        agent = self.executor.model_agent
        self.watch, self._direct = watch, direct
        self._step_log, self._timed_until, self._on_cpu = step_log, _now(), on_cpu
        self.progress = StepProgress(watch)
        # Where layers are not apart in a block nobody asks for them; a device's may be told before they are written.
        apart = isinstance(memory, KvRegion) and bool(memory.layer_parts)
        self.tells_layers = apart and (self.progress.follow_layers(agent.cache_engine.local_gpu_cache) or tells_layers)
        self.steering = Steering(policy)
        POLICY.steer(self.scheduler, self.steering)
        self.sampling_strategy = RowwiseSampling(pad_token_id=0)
        self.steps = 0
        self._eos = eos_token_ids
        self._emit = emit
        self._running: dict[str, Running] = {}
        self._ended = False
        self._step_began_s = 0.0
        self._session_ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        return self.kv

    # ---- from any thread ----

    def add(self, request: EngineRequest) -> None:
        """Queues a request; takes over its allocation. Raises EngineFailed once the loop has ended, ValueError for an
        allocation that is not the caller's any more; then nothing is queued.
        """
        now_s, emitted = time.monotonic(), request.num_emitted_tokens
        stop = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stop |= self._eos
        sampling = lmdeploy_sampling(request.sampling, emitted, stop)
        allocation = request.allocation if isinstance(request.allocation, PoolAllocation) else None
        with self.kv.lock:
            if self._ended:
                raise EngineFailed("the engine was stopped; try another worker")
            blocks = self.kv.take(allocation) if allocation else None
            session = self.scheduler.add_session(next(self._session_ids))
            account = self.kv.quota.account_of(request.tenant)
            prefix = SequencePrefix(self.kv.root(request.cache_salt), account=account)
            self.kv.cache.prefixes[session.session_id] = prefix
            seq = session.add_sequence(request.token_ids.astype(np.int64), sampling)
            self.scheduler.add_sequence(seq)
            if allocation is not None:
                self.kv.cache.begin(prefix, list(allocation.hashes))
                seq.logical_blocks.append(blocks)
                seq.set_step(allocation.num_cached_tokens)
            self.steering.enter(
                session.session_id,
                request.request_id,
                priority=request.priority,
                arrived_s=now_s,
                deadline_s=now_s + min(request.timeout_s, request.first_token_within_s),
                needed_s=request.needed_s,
                handed_over=allocation is not None and allocation.was_filled(self.kv.layout.block_size_tokens),
            )
            self._running[request.request_id] = Running(request, seq, stop, now_s)
        self.wake()

    def knows(self, request_id: str) -> bool:
        return request_id in self._running

    def cancel(self, request_id: str) -> None:
        with self.kv.lock:
            run = self._running.get(request_id)
            if run is not None:
                run.cancelled = True
        self.wake()

    def take_out(self, request_id: str) -> None:
        with self.kv.lock:
            run = self._running.get(request_id)
            if run is not None:
                run.taken_out = True
        self.wake()

    def inject(self, plan: StepPlan | None) -> None:
        """Raises ConfigError without the hook."""
        if "policy" not in hooks.available():
            raise ConfigError("this LMDeploy takes no plans: patch 0003 is missing; run `make setup`")
        with self.kv.lock:
            self.scheduler.execution_plan = None if plan is None else self.steering.planned(plan)
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
        self._loop, self._stop = asyncio.get_running_loop(), stop
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
        while not stop.is_set():
            self._wake.clear()
            self._step_began_s = time.monotonic()
            with self.kv.lock:
                self._emit_all(self._admit())
                self.kv.between_steps()
                batch, is_prefill = self._schedule()
            if batch:
                with self.watch.step():
                    for part in self._parts(batch, is_prefill):
                        await self._run_batch(part, is_prefill, go_on=True)
            else:
                await self._idle()

    async def _run_batch(
        self, batch: list[Any], is_prefill: bool, *, go_on: bool = False, failed_before: bool = False
    ) -> None:
        """One step of these sequences, or more if they may `go_on`, as `_decode` has it.

        A batch that fails is run again in halves, one sequence as it is; who fails again and alone ends with
        ENGINE_FAILED. A step that failed has changed nothing but unwritten slots. Anything but EngineFailed ends the
        engine: an executor that cannot be started again, a rank that is gone.
        """
        try:
            with self.kv.lock:
                known = self._runs()
            runs = [known[seq.session_id] for seq in batch]
            chunks: list[tuple[int, int]] = []
            if is_prefill:
                output, chunks = await self._prefill(batch, runs)
            else:
                output = await self._decode(batch, runs, go_on)
        except EngineFailed as error:
            log.exception("a step of %d sequences failed", len(batch))
            self._timed_until = _now()
            if len(batch) == 1 and failed_before:
                with self.kv.lock:
                    self._emit_all([self._end(batch[0], FinishReason.ERROR, error=error)])
                return
            half = len(batch) // 2
            for part in filter(None, (batch[:half], batch[half:])):
                await self._run_batch(part, is_prefill, failed_before=True)
            return
        if output is None:
            return
        with self.kv.lock:
            context = sum(seq.num_all_ids for seq in batch)  # the new tokens are not among them yet
            with self._giving_out(batch):
                outputs = self._collect(output, batch, not is_prefill)
                self._tell_costs(batch, chunks, context)
                self._emit_all(outputs)

    def _tell_costs(self, batch: list[Any], chunks: list[tuple[int, int]], context_tokens: int) -> None:
        """Of the step that has just ended: of these chunks of prompts, or of decoding."""
        took_s, cpu_s = self._lap()
        if chunks:
            self._step_log.add(StepCost.prefill(chunks, took_s, cpu_s))
        else:
            cost = StepCost(took_s, sequences=len(batch), context_tokens=context_tokens, cpu_seconds=cpu_s)
            self._step_log.add(cost)

    def _lap(self) -> tuple[float, float]:
        """(seconds, of these on a core) since the end of the step before, or since there was something to do again."""
        before, self._timed_until = self._timed_until, _now()
        took_s, cpu_s = (now - then for now, then in zip(self._timed_until, before, strict=True))
        return took_s, cpu_s if self._on_cpu else 0.0

    @contextlib.contextmanager
    def _giving_out(self, batch: list[Any]) -> Iterator[None]:
        """The results of a step. When that fails, some have their new token and some have not: there is no going back,
        and all of the batch end. The lock is held.
        """
        try:
            yield
        except Exception:
            log.exception("the results of a step of %d sequences are lost", len(batch))
            failure = EngineFailed(FAILED)
            self._emit_all([self._end(seq, FinishReason.ERROR, error=failure) for seq in batch if self._is_known(seq)])

    async def _decode(self, batch: list[Any], runs: list[Running], go_on: bool) -> Any:
        """One more token of each: directly where that will do, else as LMDeploy does it. Raises EngineFailed.

        With `go_on` as many direct steps as nobody but the sequences has to be asked for. Their results are given out
        here, but those of the last; None when there are none left to give out.
        """
        if self._direct is None or any(run.request.progress for run in runs) or not self._direct.takes(batch):
            return await self._forward(self._inputs(batch, is_prefill=False), runs)
        try:
            with self.kv.lock:
                inputs = self._direct.inputs(batch)
            while True:
                await asyncio.sleep(0)  # the loop's turn: nothing else waits here
                tokens = self._direct.step(inputs.ids, inputs.batch)
                self.watch.alive()
                self._stepped(0)
                with self.kv.lock:
                    if not (go_on and self._nothing_else(batch, runs, tokens.tolist(), inputs)):
                        return BatchedOutputs(tokens, stopped=None)
                    context = sum(seq.num_all_ids for seq in batch)
                    with self._giving_out(batch):
                        outputs = self._append(batch, runs, tokens.numpy())
                        self._tell_costs(batch, [], context)
                        self._emit_all(outputs)
                        inputs = self._direct.advanced(inputs, batch, tokens)
                        continue
                return None
        except Exception as error:
            raise EngineFailed(FAILED) from error

    def _nothing_else(self, batch: list[Any], runs: list[Running], tokens: list[int], inputs: DecodeInputs) -> bool:
        """Whether, after these tokens, the next step is of the same sequences, and nothing is to be done before it:
        nobody ends, waits, was cancelled or is taken out, and there are blocks to grow into. The lock is held.
        """
        assert self._direct is not None
        return (
            not self._stop.is_set()
            and not self.scheduler.has_waiting()
            and not self.kv.waits_for_a_steps_end
            and not any(run.cancelled or run.taken_out for run in runs)
            and not any(map(stopped, batch, tokens))
            and self._direct.has_room(inputs)
        )

    def _append(self, batch: list[Any], runs: list[Running], tokens: np.ndarray) -> list[SequenceOutput]:
        """What `_collect` comes to for sequences that go on."""
        outputs = []
        for seq, run, token in zip(batch, runs, tokens, strict=True):
            seq.update_token_ids(token, mode=UpdateTokenMode.DECODE)
            self.kv.cache.allocate(seq)
            outputs.append(SequenceOutput(run.request.request_id, (int(token),), engine_s=self._took_s(run)))
        self._step_began_s = time.monotonic()
        return outputs

    # ---- a prompt in chunks ----

    def _chunk_tokens(self, run: Running) -> int:
        """How many of its prompt's tokens are computed at a time: as planned, within what is configured."""
        most = int(self.cache_config.max_prefill_token_num)
        return min(run.request.chunk_tokens or most, most)

    def _parts(self, batch: list[Any], is_prefill: bool) -> list[list[Any]]:
        """Who is to be computed in chunks is computed alone, after the others."""
        if not is_prefill or len(batch) == 1:
            return [batch]
        known = self._runs()
        alone = [seq for seq in batch if seq.num_token_ids > self._chunk_tokens(known[seq.session_id])]
        together = [seq for seq in batch if seq not in alone]
        return [part for part in (together, *([seq] for seq in alone)) if part]

    async def _prefill(self, batch: list[Any], runs: list[Running]) -> tuple[Any, list[tuple[int, int]]]:
        """A step of prompts, or of one prompt chunk by chunk; of what nobody wants any more the rest is not computed.
        With its output the tokens [start, end) of each prompt that the last step computed.

        LMDeploy samples after each chunk; only the last one's token counts, for draws depend on seed and position.
        """
        step = self._inputs(batch, is_prefill=True)
        chunks = [step["inputs"]]
        computed = [(seq.num_history_ids, seq.num_all_ids) for seq in batch]
        if len(runs) == 1 and chunks[0].input_ids.numel() > (size := self._chunk_tokens(runs[0])):
            chunks = chunks[0].split(size)
        starts = itertools.accumulate((chunk.input_ids.numel() for chunk in chunks), initial=computed[0][0])
        for place, chunk in enumerate(chunks):
            if place and all(run.cancelled for run in runs):
                break
            if place:
                self._step_log.add(StepCost.prefill(computed, *self._lap()))
                await self._let_others_go(runs[0])
            output = await self._forward({**step, "inputs": chunk}, runs)
            if len(chunks) > 1:
                start = next(starts)
                computed = [(start, start + chunk.input_ids.numel())]
        return output, computed

    async def _let_others_go(self, run: Running) -> None:
        """Between two chunks of this one's prompt: who waits and comes before it, and who decodes and has earned it."""
        decoded = False
        while not self._stop.is_set():
            with self.kv.lock:
                is_prefill = self._comes_before(run)
                # Where a plan chunks the prompt, it is for those who decode: once each chunk.
                planned = run.request.chunk_tokens > 0 and not decoded
                decodes = not is_prefill and self.scheduler.has_running() and (planned or not self._may_prefill(True))
                decoded = decoded or decodes
                batch = self._batch(is_prefill) if is_prefill or decodes else []
            if not batch:
                return
            for part in self._parts(batch, is_prefill):
                await self._run_batch(part, is_prefill)

    def _comes_before(self, run: Running) -> bool:
        """Whether somebody waits whom the policy puts before this one, and there is a slot."""
        scheduler = self.scheduler
        slots = self.scheduler_config.max_batches - scheduler.num_running() - scheduler.num_locked()
        waiting = sorted(scheduler.waiting, key=lambda seq: seq.arrive_time)
        if slots <= 0 or not waiting:
            return False
        order = hooks.ask("order_waiting", scheduler, [run.seq, *waiting], lambda _, as_they_came: as_they_came)
        return order[0] is not run.seq and self._may_prefill(True)

    async def _idle(self) -> None:
        """Waits for work; when sequences wait for blocks, only a little."""
        timeout_s = BLOCKED_POLL_S if self.scheduler.has_unfinished() else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._timed_until = _now()

    def _admit(self) -> list[SequenceOutput]:
        """Ends what was cancelled or taken out since the last step, and what LMDeploy gave up on."""
        left = [run for run in self._running.values() if run.cancelled or run.taken_out]
        ended = [self._end(run.seq, FinishReason.CANCELLED) for run in left]
        aborted = list(self.scheduler.seq_manager.get_sequences(MessageStatus.ABORTED).values())
        full = KvExhausted("the sequence outgrew the KV cache; raise engine.num_blocks", retry_after_s=1.0)
        return ended + [self._end(seq, FinishReason.ERROR, error=full) for seq in aborted]

    def _schedule(self) -> tuple[list[Any], bool]:
        """The next batch, with its blocks, and whether it is one of new sequences; empty when nothing can run.

        New ones go as soon as there is room for one, unless the policy lets the running ones decode first. (LMDeploy's
        own rule lets up to three new ones wait for as long as half of the slots are taken.)
        """
        scheduler = self.scheduler
        has_slot = scheduler.has_waiting() and scheduler.num_running() < self.scheduler_config.max_batches
        if self._may_prefill(has_slot) and (batch := self._batch(is_prefill=True)):
            return batch, True
        return (self._batch(is_prefill=False) if scheduler.has_running() else []), False

    def _may_prefill(self, possible: bool) -> bool:
        return bool(hooks.ask("should_prefill", self.scheduler, possible, self.steering.should_prefill))

    def _batch(self, is_prefill: bool) -> list[Any]:
        """What LMDeploy's scheduler chooses, locked. It may fail on one sequence: that one ends, the others stay."""
        running = set(self.scheduler.seq_manager.get_sequences(MessageStatus.RUNNING))
        self.kv.cache.at_work = None
        try:
            prealloc = self.engine_strategy.get_prealloc_size(not is_prefill)
            batch: list[Any] = self.scheduler.schedule(is_prefill=is_prefill, prealloc_size=prealloc).running
        except Exception:
            culprit = self.kv.cache.at_work
            if culprit is None or not self._is_known(culprit):
                raise
            log.exception("scheduling failed on a sequence; it ends")
            for seq in self.scheduler.running:
                if seq.seq_id not in running:
                    self.scheduler._set_message_status(seq, MessageStatus.WAITING)
            self._emit_all([self._end(culprit, FinishReason.ERROR, error=EngineFailed(FAILED))])
            return []
        self.scheduler.lock_running(batch)
        return batch

    def _inputs(self, batch: list[Any], is_prefill: bool) -> dict[str, Any]:
        """LMDeploy's inputs of a step for sequences that have their blocks. Raises EngineFailed."""
        try:
            with self.kv.lock:
                inputs = self.create_model_inputs(batch, is_prefill)
            return {
                "inputs": inputs,
                "swap_in_map": {},
                "swap_out_map": {},
                "loop_count": self.engine_strategy.get_num_loops(not is_prefill),
                "sampling_inputs": self.sampling_strategy.make_sampling_inputs(batch),
                "stopping_criteria": self.model_agent_strategy.make_stopping_criteria(batch),
                "return_logits": self.specdecode_config is not None,
                "is_dummy": False,
                "sync_long_context": inputs.input_ids.numel() > self.cache_config.max_prefill_token_num,
                "extra_inputs": self.model_agent_strategy.make_extra_inputs(batch),
                "return_routed_experts": False,
            }
        except Exception as error:
            raise EngineFailed(FAILED) from error

    async def _start_executor(self) -> None:
        """In a task of its own: on a failure LMDeploy's model agent cancels the task that started it."""

        async def start() -> None:
            self.executor.start(None)

        await asyncio.create_task(start())

    def _stepped(self, prefill_tokens: int) -> None:
        self.steps += 1
        with self.kv.lock:
            self.steering.stepped(prefill_tokens)

    async def _forward(self, step: dict[str, Any], runs: list[Running]) -> Any:
        """Runs the batch. Raises EngineFailed when LMDeploy's model agent died of it; it is started again then."""
        agent, inputs = self.executor.model_agent, step["inputs"]
        self.progress.begin_step([run.request.progress if run.keeps_its_blocks() else None for run in runs])
        try:
            with self.progress.forward(inputs.history_lengths, inputs.seq_length):
                await self.executor.forward_async(step)
                output = asyncio.ensure_future(self.executor.get_output_async())
                await asyncio.wait(
                    {output, agent._background_task, agent._preprocess_task}, return_when=asyncio.FIRST_COMPLETED
                )
                if not output.done():
                    output.cancel()
                    self.executor.stop()
                    await self._start_executor()
                    raise EngineFailed(FAILED)
        finally:
            self.progress.end_step()
        self._stepped(0 if inputs.is_decoding else inputs.input_ids.numel())
        return output.result()

    def _collect(self, output: Any, running: list[Any], is_decoding: bool) -> list[SequenceOutput]:
        """Appends the new tokens, publishes computed blocks, ends what is finished."""
        rows = list(zip(running, output.next_token_ids.tolist(), self._logprobs(output, running), strict=True))
        output.stopped = torch.tensor([stopped(seq, token) for seq, token, _ in rows])
        rows = [row for row in rows if row[0].status == MessageStatus.LOCKED]
        self.seq_strategy.update_running(running=running, batched_outputs=output, is_decoding=is_decoding)
        self.scheduler.unlock_running(running)
        runs = self._runs()
        for seq, _, _ in rows:
            if not runs[seq.session_id].cancelled:  # else its step may have been abandoned half-way
                self.kv.cache.allocate(seq)
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
                outputs.append(SequenceOutput(run.request.request_id, (token,), logprobs, engine_s=self._took_s(run)))
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
        well = reason in (FinishReason.STOP, FinishReason.LENGTH)
        # A step that was cancelled may have been abandoned half-way: nobody knows what is in its blocks.
        out = reason is FinishReason.CANCELLED and run.taken_out and not run.cancelled and seq.num_history_ids > 0
        if (run.request.hold_blocks and well) or out:
            held = self.kv.hold(seq.logical_blocks.get_real_blocks(), seq.num_history_ids)
        self.kv.cache.prefixes.pop(seq.session_id)
        self.steering.leave(seq.session_id)
        self.end_session(seq.session_id)
        return SequenceOutput(run.request.request_id, token_ids, logprobs, reason, error, held, self._took_s(run))

    def _took_s(self, run: Running) -> float:
        """As `SequenceOutput.engine_s`."""
        began_s = self._step_began_s if run.submitted_s is None else run.submitted_s
        run.submitted_s = None
        return time.monotonic() - began_s

    def _is_known(self, seq: Any) -> bool:
        return any(run.seq is seq for run in self._running.values())

    def _emit_all(self, outputs: list[SequenceOutput]) -> None:
        if outputs:
            self._emit(outputs)
