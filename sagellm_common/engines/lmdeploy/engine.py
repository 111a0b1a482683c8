"""The LMDeploy engine behind `engines/base.py`: it loads and computes on one thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_common.core.capability import DeviceKind
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import Config
from sagellm_common.core.config import EngineConfig as EngineSection
from sagellm_common.core.errors import ConfigError, EngineFailed, InvalidRequest
from sagellm_common.core.step_costs import StepLog
from sagellm_common.core.types import KvLayout, ModelInfo
from sagellm_common.engines.base import EngineRequest, EngineStats, StepCallback
from sagellm_common.engines.checkpoint import eos_token_ids, model_fingerprint, read_model_config
from sagellm_common.engines.limits import check_request
from sagellm_common.engines.lmdeploy import device, hooks, overlay
from sagellm_common.engines.lmdeploy.overlay import LMDEPLOY_VERSION
from sagellm_common.engines.thread import join_thread, start_thread
from sagellm_common.engines.watchdog import StepWatch, stuck, where_is
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.kv_runtime.host_cache import HostCache
from sagellm_common.scheduler_ir.engine_policy import RankedPolicy, StepPlan

if TYPE_CHECKING:
    from sagellm_common.engines.lmdeploy.core import EngineCore
    from sagellm_common.engines.lmdeploy.kernels.direct import DirectDecode

log = logging.getLogger(__name__)

FIX = "`sagellm engine patches --build` makes a patched copy, as `make setup` does"


def check_divisible(model: dict[str, Any], ranks: int) -> None:
    """Raises ConfigError when the model's heads cannot be shared out evenly."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = model.get(name, ranks)
        if heads % ranks:
            raise ConfigError(
                f"engine.tensor_parallel: {ranks} does not divide the model's {name} {heads}; use a divisor of it"
            )


class LmdeployEngine:
    """Engine over LMDeploy's PyTorch engine. See `engines/base.py` for the contract."""

    def __init__(self, config: Config) -> None:
        overlay.check_version()
        self._config: EngineSection
        self._config, self._device = device.resolve(config.engine, config.transport)
        self._tenants = config.kv.tenants
        self._host_budget_bytes = config.kv.host_budget_bytes
        self._path = Path(config.model.path)
        self._hf = read_model_config(self._path)
        check_divisible(self._hf, self._config.tensor_parallel)
        self._name = config.model.name or self._path.resolve().name
        overlay.use(self._config.patches)
        self._thread: threading.Thread | None = None
        self._core: EngineCore | None = None
        self._model: ModelInfo | None = None
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed: BaseException | None = None
        self._watch = StepWatch(SystemClock())
        self.step_log = StepLog()
        self._watchdog: asyncio.Task[None] | None = None
        self._stuck = False
        self._ended = asyncio.Event()
        self._kernels = ""

    @property
    def ended(self) -> asyncio.Event:
        return self._ended

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "the engine is not started"
        return self._model

    @property
    def description(self) -> str:
        return f"{hooks.describe()}; on {self._device.summary}{self._kernels}"

    @property
    def kv(self) -> KVBackendProtocol:
        return self._started().kv

    async def start(self, on_step: StepCallback) -> None:
        self._thread, ready = start_thread("lmdeploy", self._main, on_step, self._ended)
        await asyncio.wrap_future(ready)
        self._watchdog = asyncio.create_task(self._end_when_stuck(self._thread), name="engine watchdog")

    def submit(self, request: EngineRequest) -> None:
        core = self._started()
        if core.knows(request.request_id):
            raise InvalidRequest(f"request_id {request.request_id!r} is running already; use a new one")
        check_request(request, self.model)
        core.add(request)

    def cancel(self, request_id: str) -> None:
        self._started().cancel(request_id)

    def take_out(self, request_id: str) -> None:
        self._started().take_out(request_id)

    def inject(self, plan: StepPlan | None) -> None:
        """Puts a plan over the policy, from the next step on; None takes it away. Raises ConfigError when LMDeploy
        lacks the hook.
        """
        self._started().inject(plan)

    def stats(self) -> EngineStats:
        core = self._started()
        running, waiting = core.counts()
        return EngineStats(running, waiting, core.steps)

    async def close(self) -> None:
        if self._thread is None:
            return
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended, or is about to
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._core is not None:
            self._core.wake()
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._stuck:  # else it may never end, and must not keep the process: it is a daemon
            await join_thread(self._thread)

    async def _end_when_stuck(self, thread: threading.Thread) -> None:
        limit_s = self._config.step_timeout_s
        await stuck(self._watch, limit_s)
        self._stuck = True
        self._failed = EngineFailed(
            f"a step of the engine has made no progress for {limit_s:g} s; restart the worker, or raise "
            "engine.step_timeout_s if its steps take that long"
        )
        log.critical("%s. Its thread is here:\n%s", self._failed.message, where_is(thread))
        self._ended.set()

    def _started(self) -> EngineCore:
        if isinstance(self._failed, EngineFailed):
            raise EngineFailed(self._failed.message)
        if self._failed is not None:
            raise EngineFailed("the engine stopped; restart the worker, its log has the cause")
        assert self._core is not None, "the engine is not started"
        return self._core

    # ---- on the engine's thread ----

    def _main(self, emit: StepCallback, ready: Future[None]) -> None:
        try:
            asyncio.run(self._run(emit, ready))
        except BaseException as error:
            # The thread's last word: it goes to `start`, or to whoever calls later.
            self._failed = error
            if ready.done():
                log.exception("the engine stopped")
            else:
                ready.set_exception(error)

    async def _run(self, emit: StepCallback, ready: Future[None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._check_hooks()
        try:
            self._core = self._load(emit)
        except (Exception, SystemExit) as error:  # LMDeploy raises all kinds for a model it cannot load, and exits
            if type(error).__name__ == "OutOfMemoryError":  # torch's, of any device
                raise ConfigError(
                    f"engine.num_blocks: {self._config.num_blocks} KV blocks and the weights do not fit into the "
                    f"memory of {self._device.summary}; use fewer, or another device"
                ) from error
            log.exception("LMDeploy could not load %s", self._path)
            raise ConfigError(
                f"model.path: LMDeploy {LMDEPLOY_VERSION} cannot load {str(self._path)!r} "
                f"({self._hf.get('architectures')}): {type(error).__name__}: {error}"
            ) from error
        ready.set_result(None)
        await self._core.run(self._stop)

    def _check_hooks(self) -> None:
        """Says what the engine has to do without. Raises ConfigError when engine.patches wants everything."""
        missing = hooks.missing()
        if not missing:
            log.info("%s", hooks.describe())
            return
        if self._config.patches == "required":
            raise ConfigError(f"engine.patches is 'required', but LMDeploy lacks {', '.join(missing)}; {FIX}")
        told_so = self._config.patches == "off"
        log.log(logging.INFO if told_so else logging.WARNING, "%s; %s", hooks.describe(), FIX)

    def _describe_kernels(self) -> str:
        """What computes on a CPU: the compiled kernels for an instruction set, or torch. Empty on other devices."""
        if self._device.kind is not DeviceKind.CPU:
            return ""
        from sagellm_common.engines.lmdeploy.kernels.native import native_ops

        ops = native_ops()
        found = f"{ops.name} kernels" if ops else "torch in place of compiled kernels"
        return f", {found}" if self._config.weights == "dtype" else f", {self._config.weights} weights, {found}"

    def _overrides(self) -> dict[str, Any] | None:
        """What LMDeploy is to read in config.json instead: the class that computes with quantised weights."""
        if self._config.weights == "dtype":
            return None
        from sagellm_common.engines.lmdeploy.kernels import model

        model.register()
        return {"architectures": [model.architecture(self._config.weights, self._hf.get("architectures", []))]}

    def _direct_decode(self, core: EngineCore) -> DirectDecode | None:
        if self._config.weights == "dtype":
            return None
        from sagellm_common.engines.lmdeploy.block_manager import manager_of
        from sagellm_common.engines.lmdeploy.kernels.direct import DirectDecode

        agent = core.executor.model_agent
        model, caches = agent.patched_model.get_model(), agent.cache_engine.gpu_cache
        return DirectDecode(model, caches, manager_of(core.scheduler))

    def _load(self, emit: StepCallback) -> EngineCore:
        import torch

        torch.set_num_threads(self._config.threads)
        target = device.prepare(self._config, self._device)  # before the rest of LMDeploy is imported
        self._kernels = self._describe_kernels()
        from lmdeploy.utils import get_logger as lmdeploy_logger

        lmdeploy_logger("lmdeploy").setLevel(logging.WARNING)
        hooks.enable()  # before there is a scheduler
        from sagellm_common.engines.lmdeploy.core import EngineCore

        cfg = self._config
        context = int(cfg.context_length_tokens or self._hf.get("max_position_embeddings", 2048))
        core = EngineCore(
            str(self._path),
            target.engine_config(
                dtype=cfg.dtype,
                tp=cfg.tensor_parallel,
                block_size=cfg.block_size_tokens,
                num_gpu_blocks=cfg.num_blocks,
                max_batch_size=cfg.max_batch_size,
                max_prefill_token_num=cfg.max_prefill_tokens,
                session_len=context,
                quant_policy=cfg.kv_quant_bits,
                prefill_interval=1,  # a waiting request joins after any decode step, not after sixteen
                logprobs_mode="raw_logprobs",
                hf_overrides=self._overrides(),
            ),
        )
        window = core.cache_config.window_size
        if 0 < window < core.max_session_len or core.cache_config.states_shapes:
            raise ConfigError(
                "its KV is not kept whole (sliding window or recurrent state), so it cannot be handed over; "
                f"a window of {window} tokens needs engine.context_length_tokens of at most that"
            )
        cache_engine = core.executor.model_agent.cache_engine
        memory = target.kv_memory(cache_engine)
        heads, head_dim = core.model_config.num_key_value_heads, core.model_config.k_head_dim
        layout = KvLayout(
            # KV computed with other weights is other KV, whatever its dtype.
            model_fingerprint=model_fingerprint(self._path) + ("" if cfg.weights == "dtype" else f"/{cfg.weights}"),
            dtype=device.kv_dtype(cfg, cache_engine),
            block_size_tokens=cfg.block_size_tokens,
            num_layers=core.model_config.num_layers,
            num_kv_heads=heads,
            head_dim=head_dim,
            block_bytes=memory.block_bytes,
            tp=cfg.tensor_parallel,
        )
        core.attach(
            layout,
            memory,
            prefix_caching=cfg.prefix_caching,
            eviction=cfg.eviction,
            tenants=self._tenants,
            tells_layers=cfg.weights != "dtype",
            direct=self._direct_decode(core),
            watch=self._watch,
            step_log=self.step_log,
            on_cpu=self._device.kind is DeviceKind.CPU,
            policy=RankedPolicy(
                order=cfg.policy,
                cheap_recompute_tokens=cfg.max_prefill_tokens,
                prefill_tokens_per_decode_step=cfg.prefill_tokens_per_decode_step,
            ),
            eos_token_ids=eos_token_ids(self._path, self._hf),
            emit=emit,
        )
        if self._host_budget_bytes:
            core.kv.keep_below(HostCache(self._host_budget_bytes, layout, SystemClock(), cfg.eviction))
        log.info("KV can be pulled %s", "layer by layer" if core.tells_layers else "by whole chunks of a prompt only")
        self._model = ModelInfo(
            name=self._name,
            path=str(self._path.resolve()),
            context_length_tokens=core.max_session_len,
            vocab_size=core.model_config.vocab_size,
            kv_layout=layout,
        )
        return core
