"""One engine in a process of its own, which does what it is told over a pipe.

A process each, because stock and patched LMDeploy are two packages of one name, because prefill and decode are two
workers, and because an engine gives its memory back for certain only when its process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 600.0
"""No answer takes longer: the slowest is to load 16 GB, and to compile kernels."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """`patched_tree` holds the lmdeploy/ to import, None is pip's. `staged`: the host's KV is treated as a device's."""

    name: str
    model: str
    engine: dict[str, Any]
    patched_tree: str | None
    staged: bool


class Failed(Exception):
    """A worker could not do something; the message is its error."""


class Worker:
    """The parent's end."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = get_context("spawn")
        self.name = spec.name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(spec, theirs), name=spec.name, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Raises Failed, also when the process ends or says nothing for TIMEOUT_S."""
        self.tell(operation, **arguments)
        return self.answer(operation)

    def tell(self, operation: str, **arguments: Any) -> None:
        with contextlib.suppress(OSError):  # it ended; `answer` says so
            self._pipe.send((operation, arguments))

    def answer(self, operation: str) -> Any:
        if not self._pipe.poll(TIMEOUT_S):
            raise Failed(f"{self.name} did not answer to {operation!r} within {TIMEOUT_S:g} s")
        try:
            ok, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(TIMEOUT_S)
            code = self._process.exitcode
            raise Failed(f"{self.name} ended with exit code {code} during {operation!r}") from None
        if not ok:
            raise Failed(f"{self.name}: {operation}: {result}")
        return result

    def close(self) -> None:
        """Idempotent. Kills what does not end by itself."""
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def workers(specs: Sequence[WorkerSpec]) -> Iterator[list[Worker]]:
    """Starts them side by side; ready when yielded. Raises Failed."""
    started = [Worker(spec) for spec in specs]
    try:
        for worker in started:
            worker.answer("load")
        yield started
    finally:
        for worker in started:
            worker.close()


# ---- the worker's process ----


def main(spec: WorkerSpec, pipe: Connection) -> None:
    if spec.patched_tree is not None:
        sys.path.insert(0, spec.patched_tree)
    asyncio.run(_serve(spec, pipe))


async def _serve(spec: WorkerSpec, pipe: Connection) -> None:
    """Until the parent closes the pipe. An operation that fails is answered with its error, and the next one comes."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            engine = EngineUnderTest(spec)
            stack.push_async_callback(engine.close)
            await engine.start()
        except Exception as error:  # noqa: BLE001 - goes to the parent, whatever it is
            pipe.send((False, f"{type(error).__name__}: {error}"))
            return
        pipe.send((True, None))
        while True:
            try:
                operation, arguments = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    pipe.send((True, await getattr(engine, operation)(**arguments)))
            except Exception as error:  # noqa: BLE001
                pipe.send((False, f"{type(error).__name__}: {error}"))


class EngineUnderTest:
    """The operations. Greedy, end-of-sequence ignored, so that lengths are what was asked for."""

    def __init__(self, spec: WorkerSpec) -> None:
        from sagellm_common.core.config import Config
        from sagellm_common.engines import make_engine

        self._config = Config.model_validate({"model": {"path": spec.model}, "engine": spec.engine})
        self._engine = make_engine(self._config)
        self._staged = spec.staged
        self._ids = iter(range(1 << 30))
        self._waiting: dict[str, asyncio.Queue[Any]] = {}
        self._steps: list[tuple[float, int]] = []  # (when, sequences) of each step

    async def start(self) -> None:
        from sagellm_common.comm_backend import make_channel
        from sagellm_common.comm_backend.handoff import HandoffSource
        from sagellm_common.core.clock import SystemClock

        await self._engine.start(self._on_step)
        self._leases = HandoffSource(3600.0, SystemClock(), self._engine.kv.free)
        memory = self._engine.kv.regions()
        if self._staged:
            memory = _as_of_a_device(memory, self._engine.kv.layout.num_layers)
        self._memory = memory
        self._channel = make_channel(self._config.transport, memory, self._leases, "127.0.0.1", 0)
        await self._channel.start()

    async def close(self) -> None:
        if hasattr(self, "_channel"):
            await self._channel.close()
        await self._engine.close()

    def _on_step(self, outputs: Any) -> None:
        self._steps.append((time.perf_counter(), len(outputs)))
        for output in outputs:
            self._waiting[output.request_id].put_nowait(output)

    async def _run(self, tokens: list[int], new_tokens: int, **request: Any) -> tuple[list[int], Any]:
        """New tokens and the last output. Raises what the sequence ended with."""
        from sagellm_common.core.types import SamplingParams, as_token_ids
        from sagellm_common.engines.base import EngineRequest

        request_id = str(next(self._ids))
        queue = self._waiting[request_id] = asyncio.Queue()
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        self._engine.submit(replace(EngineRequest(request_id, as_token_ids(tokens), sampling), **request))
        found: list[int] = []
        while True:
            output = await queue.get()
            found += output.token_ids
            if output.finish_reason is not None:
                del self._waiting[request_id]
                if output.error is not None:
                    raise output.error
                return found, output

    # ---- operations ----

    async def about(self) -> dict[str, Any]:
        import torch
        import transformers

        found = {
            "engine": self._engine.description,
            "device": self._config.engine.device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "block_bytes": self._memory.block_bytes,
            "kv_memory": type(self._memory).__name__,
        }
        if self._config.engine.device == "cuda":
            found |= {"gpu": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.max_memory_allocated()}
        return found

    async def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """One after the other: what a batch does to rounding is no matter then."""
        return [(await self._run(prompt, new_tokens))[0] for prompt in prompts]

    async def prefill_seconds(self, prompts: list[list[int]]) -> float:
        """Until the last of the prompts, sent together, has its first token."""
        began = time.perf_counter()
        await asyncio.gather(*(self._run(prompt, 1) for prompt in prompts))
        return time.perf_counter() - began

    async def tpot_ms(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Times between steps in which every one of the prompts got a token."""
        self._steps.clear()
        await asyncio.gather(*(self._run(prompt, new_tokens) for prompt in prompts))
        # Before the first of them there was a prefill.
        full = [when for when, sequences in self._steps if sequences == len(prompts)]
        return [1e3 * (b - a) for a, b in itertools.pairwise(full[1:])]

    async def prefill(self, prompt: list[int]) -> tuple[int, Any]:
        """The first token, and where its KV can be pulled from."""
        from sagellm_common.core.types import KvSource

        (token,), last = await self._run(prompt, 1, hold_blocks=True)
        transfer_id = str(next(self._ids))
        self._leases.pin(transfer_id, 1, last.held, len(prompt))
        source = KvSource(
            transfer_id=transfer_id,
            epoch=1,
            worker_id="prefill",
            incarnation="1",
            control_address="",
            data_address=self._channel.address,
            backend=self._channel.name,
            block_table=last.held.block_ids,
            num_tokens=len(prompt),
            lease_expires_in_ms=3_600_000,
        )
        return token, source

    async def release(self, transfer_id: str) -> None:
        self._leases.release(transfer_id, 1, committed=True)

    async def decode(self, prompt: list[int], first: int, source: Any, new_tokens: int) -> dict[str, Any]:
        """Pulls, then goes on: tokens (the first included), and what the pull took."""
        from sagellm_common.comm_backend.protocol import Pull
        from sagellm_common.core.types import as_token_ids

        allocation = self._engine.kv.allocate(as_token_ids(prompt), len(prompt))
        try:
            asked = Pull(source, source.block_table, allocation.block_ids, timeout_s=TIMEOUT_S)
            moved = await self._channel.pull(asked)
        except BaseException:
            self._engine.kv.free(allocation)
            raise
        allocation.num_cached_tokens = len(prompt)
        rest, _ = await self._run([*prompt, first], new_tokens, allocation=allocation, num_emitted_tokens=1)
        return {"tokens": [first, *rest], "bytes": moved.bytes, "seconds": moved.seconds}


def _as_of_a_device(region: Any, num_layers: int) -> Any:
    """Host memory as `TensorKvMemory` has a device's: staged copies instead of in place. For the dry run."""
    import torch

    from sagellm_common.engines.lmdeploy.kv_memory import TensorKvMemory

    pool = torch.frombuffer(region.view, dtype=torch.uint8).view(region.num_blocks, 2 * num_layers, -1)
    return TensorKvMemory([pool.transpose(0, 1)])


def patched_tree(scratch: Path) -> Path:
    """The folder of an lmdeploy/ with our patches: the one `make setup` made, or a copy made now. Raises Failed."""
    import importlib.util
    import shutil
    import subprocess

    from sagellm_common.engines.lmdeploy import overlay

    if (made := overlay.existing_overlay()) is not None:
        return made
    spec = importlib.util.find_spec("lmdeploy")
    assert spec is not None and spec.origin is not None, "looked for before"
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(Path(spec.origin).parent, scratch / "lmdeploy", ignore=ignored)
    script = Path(__file__).parents[2] / "third_party" / "apply_patches.sh"
    done = subprocess.run(
        ["bash", str(script), "--target", str(scratch)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise Failed(f"cannot patch LMDeploy: {done.stderr.strip() or done.stdout.strip()}")
    return scratch
