"""The engine on `cuda` where there is no GPU: LMDeploy's own CUDA backend, cache and Triton kernels, on CPU tensors.

    python -m tests.support.interpreted_cuda MODEL        prints what came of it as JSON

triton's interpreter runs the kernels. The rest of CUDA is pretended: torch calls for device `cuda` get the CPU, streams
and events do nothing, the probe finds a recorded H200. What differs from a GPU is speed, concurrency and rounding;
what is the same is every line of Python on the way. In a process of its own, for none of this can be taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
os.environ["LMD_SKIP_WARMUP"] = "1"  # which compiles kernels, of which there is nothing here

import torch
from torch.overrides import TorchFunctionMode

from tests.support.pretended_gpu import alias_libdevice, pretend_gpu

PROMPT_TOKENS, NEW_TOKENS, CHUNK_TOKENS = (5, 18), 3, 16


def _host(device: Any) -> Any:
    cuda = device.startswith("cuda") if isinstance(device, str) else getattr(device, "type", "") == "cuda"
    return "cpu" if cuda else device


class CudaIsTheHost(TorchFunctionMode):
    """Of the thread that enters it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _host(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(map(_host, args))
        return func(*args, **kwargs)


class _Stream:
    """And event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


def pretend_cuda() -> None:
    """torch.cuda and triton's driver as LMDeploy asks them. Before anything of LMDeploy's kernels is imported."""
    pretend_gpu(("cpu", 0, 0), (8, 0), processors=4)
    stream = _Stream()
    pretended = {
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (8 << 30, 16 << 30),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "graph_pool_handle": lambda: (0, 0),
    }
    for name, stand_in in pretended.items():
        setattr(torch.cuda, name, stand_in)


def alias_all() -> None:
    import lmdeploy.pytorch.kernels.cuda.activation as activation
    import lmdeploy.pytorch.kernels.cuda.flashattention as flash
    import lmdeploy.pytorch.kernels.cuda.pagedattention as paged
    import triton.language as tl

    alias_libdevice(flash, paged)
    activation.fast_expf = lambda x: tl.exp(x)


def on_a_recorded_h200() -> None:
    """The engine chooses among the devices of a machine with H200s, and computes with what `pretend_cuda` made."""
    from sagellm_common.comm_backend.hardware import select_device
    from sagellm_common.engines.lmdeploy import device
    from tests.support.recorded_machines import NVIDIA

    device.select_device = lambda wanted, host=None: select_device(wanted, NVIDIA)
    prepare = device.prepare

    def prepare_here(*args: Any) -> Any:  # called on the engine's thread
        CudaIsTheHost().__enter__()
        return prepare(*args)

    device.prepare = prepare_here


async def run(model: str, kv_quant_bits: int) -> dict[str, Any]:
    """Tokens of one engine on `cuda`: plain, batched, and after their KV was moved to other blocks."""
    from sagellm_common.core.config import Config
    from sagellm_common.core.kv_progress import KvProgress, Watermark
    from sagellm_common.core.types import SamplingParams, as_token_ids
    from sagellm_common.engines import make_engine
    from sagellm_common.engines.base import EngineRequest

    engine_config = {
        "device": "cuda",
        "dtype": "float16",  # numpy, in which the interpreter computes, knows no bfloat16
        "cuda_graphs": False,
        "kv_quant_bits": kv_quant_bits,
        "num_blocks": 32,
        "max_batch_size": 2,
        "max_prefill_tokens": 64,
    }
    engine = make_engine(Config.model_validate({"model": {"path": model}, "engine": engine_config}))
    queues: dict[str, asyncio.Queue[Any]] = {}

    def on_step(outputs: Any) -> None:
        for output in outputs:
            queues[output.request_id].put_nowait(output)

    async def tokens_of(prompt: list[int], new_tokens: int, **request: Any) -> tuple[list[int], Any]:
        request_id = str(len(queues))
        queue = queues[request_id] = asyncio.Queue()
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        engine.submit(replace(EngineRequest(request_id, as_token_ids(prompt), sampling), **request))
        found: list[int] = []
        while True:
            output = await queue.get()
            found += output.token_ids
            if output.finish_reason is not None:
                if output.error is not None:
                    raise output.error
                return found, output

    async def handed_over(prompt: list[int]) -> list[int]:
        first, last = await tokens_of(prompt, 1, hold_blocks=True)
        target = engine.kv.allocate(as_token_ids(prompt), len(prompt), "shared with nobody")
        memory = engine.kv.regions()
        with memory.reading(last.held.block_ids) as (source, rows), memory.writing(target.block_ids) as (into, to):
            for row, to_row in zip(rows.tolist(), to.tolist(), strict=True):
                into.block(to_row)[:] = source.block(row)
        engine.kv.free(last.held)
        target.num_cached_tokens = len(prompt)
        rest, _ = await tokens_of(prompt + first, NEW_TOKENS, allocation=target, num_emitted_tokens=1)
        return first + rest

    async def followed(prompt: list[int]) -> list[tuple[int, int, int]]:
        """What whoever pulls its KV hears while it is computed in two chunks."""
        marks: list[Watermark] = []

        class Recorded(KvProgress):
            def _set(self, mark: Watermark) -> None:
                super()._set(mark)
                marks.append(mark)

        target = engine.kv.allocate(as_token_ids(prompt), len(prompt), "known to nobody")
        progress = Recorded(len(prompt), 0, engine.kv.layout.block_size_tokens)
        await tokens_of(prompt, 1, allocation=target, progress=progress, chunk_tokens=CHUNK_TOKENS)
        return [(mark.tokens, mark.chunk_end, mark.layers) for mark in marks]

    await engine.start(on_step)
    prompts = [[3 + (7 * n + 11 * length) % 250 for n in range(length)] for length in PROMPT_TOKENS]
    if kv_quant_bits:
        prompts = prompts[1:]
    try:
        batched = await asyncio.gather(*(tokens_of(prompt, NEW_TOKENS) for prompt in prompts))
        return {
            "prompts": prompts,
            "alone": [(await tokens_of(prompt, NEW_TOKENS))[0] for prompt in prompts],
            "batched": [tokens for tokens, _ in batched],
            "handed_over": [await handed_over(prompt) for prompt in prompts],
            "followed": await followed(prompts[-1]),
            "memory": type(engine.kv.regions()).__name__,
            "layout_dtype": engine.kv.layout.dtype,
            "cpu_plug_in": "sagellm_common.engines.lmdeploy.device_cpu.install" in sys.modules,
        }
    finally:
        await engine.close()


def main(model: str) -> None:
    pretend_cuda()
    from sagellm_common.engines.lmdeploy import overlay

    overlay.use("auto")
    alias_all()
    on_a_recorded_h200()
    print(json.dumps({str(bits): asyncio.run(run(model, bits)) for bits in (0, 8)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
