"""What is checked and measured of one model shape."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_check.reference import judge
from bench.gpu_check.shapes import SHAPES, Shape, write_checkpoint
from bench.gpu_check.worker import Worker, WorkerSpec, patched_tree, workers

Say = Callable[[str], None]

STOCK, PATCHED, DECODE = "stock", "patched", "patched, decode"

PEAK_FLOPS = {
    "H200": 989.5e12,  # NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity, half of it without
    "H100 80GB HBM3": 989.5e12,  # NVIDIA H100 data sheet, SXM
    "A100": 312e12,  # NVIDIA A100 data sheet
}
"""Dense bfloat16 of tensor cores, by what the device's name contains."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How large everything is."""

    device: str
    dtype: str
    shapes: tuple[str, ...]
    greedy_prompts: tuple[int, ...]
    greedy_new_tokens: int
    prefill_prompts: int
    prefill_tokens: int
    batches: tuple[int, ...]
    decode_prompt_tokens: int
    decode_new_tokens: int
    transfer_tokens: int
    rounds: int
    block_size_tokens: int
    max_prefill_tokens: int
    cuda_graphs: bool
    tolerance: float
    matmul_size: int

    @property
    def context_length_tokens(self) -> int:
        longest = max(self.prefill_tokens, self.transfer_tokens, *self.greedy_prompts)
        return longest + max(self.greedy_new_tokens, self.decode_new_tokens) + 64

    @property
    def num_blocks(self) -> int:
        """For the largest of what runs at a time, with a block to spare for each sequence."""
        decode = max(self.batches) * (self.decode_prompt_tokens + self.decode_new_tokens)
        tokens = max(decode, self.prefill_prompts * self.prefill_tokens, self.transfer_tokens + self.greedy_new_tokens)
        return tokens // self.block_size_tokens + 2 * max(*self.batches, self.prefill_prompts) + 16


FULL = Settings(
    device="cuda",
    dtype="bfloat16",
    shapes=("1B", "8B"),
    greedy_prompts=(17, 130, 1000, 2500),
    greedy_new_tokens=32,
    prefill_prompts=8,
    prefill_tokens=2048,
    batches=(1, 32, 128),
    decode_prompt_tokens=128,
    decode_new_tokens=128,
    transfer_tokens=8192,
    rounds=5,
    block_size_tokens=64,
    max_prefill_tokens=8192,
    cuda_graphs=True,
    tolerance=0.01,
    matmul_size=8192,
)

DRY_RUN = Settings(
    device="cpu",
    dtype="float32",
    shapes=("tiny",),
    greedy_prompts=(5, 17, 40),
    greedy_new_tokens=6,
    prefill_prompts=2,
    prefill_tokens=64,
    batches=(1, 2, 4),
    decode_prompt_tokens=8,
    decode_new_tokens=24,
    transfer_tokens=100,
    rounds=1,
    block_size_tokens=16,
    max_prefill_tokens=64,
    cuda_graphs=False,
    tolerance=0.01,
    matmul_size=256,
)


def random_prompts(rng: random.Random, shape: Shape, count: int, tokens: int) -> list[list[int]]:
    return [[rng.randrange(3, shape.vocab_size) for _ in range(tokens)] for _ in range(count)]


def check_shape(settings: Settings, name: str, say: Say) -> dict[str, Any]:
    """Everything about one shape. Raises `worker.Failed`."""
    shape = SHAPES[name]
    say(f"{name}: {shape.parameters / 1e9:.2f} billion parameters")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        scratch, began = Path(directory), time.perf_counter()
        model = write_checkpoint(
            shape, scratch / "model", settings.device, settings.dtype, settings.context_length_tokens
        )
        patched = patched_tree(scratch / "patched")
        say(f"checkpoint written in {time.perf_counter() - began:.0f} s")
        began = time.perf_counter()
        with workers(_specs(settings, model, patched)) as (stock, prefill, decode):
            say(f"three engines loaded in {time.perf_counter() - began:.0f} s")
            found = {
                "parameters": shape.parameters,
                "engines": {worker.name: worker.ask("about") for worker in (stock, prefill, decode)},
                **_tokens(settings, shape, model, stock, prefill, decode, say),
                "transfer": _transfer(settings, shape, prefill, decode, say),
                "speed": _speed(settings, shape, stock, prefill, say),
            }
    return found


def _specs(settings: Settings, model: Path, patched: Path) -> list[WorkerSpec]:
    engine = {
        "device": settings.device,
        "dtype": settings.dtype,
        "cuda_graphs": settings.cuda_graphs,
        "block_size_tokens": settings.block_size_tokens,
        "num_blocks": settings.num_blocks,
        "max_batch_size": max(settings.batches),
        "max_prefill_tokens": settings.max_prefill_tokens,
        "prefix_caching": False,  # what is measured is computed
    }
    dry = settings.device == "cpu"
    return [
        WorkerSpec(STOCK, str(model), engine | {"patches": "off"}, None, staged=dry),
        *(WorkerSpec(name, str(model), engine, str(patched), staged=dry) for name in (PATCHED, DECODE)),
    ]


def _tokens(
    settings: Settings, shape: Shape, model: Path, stock: Worker, prefill: Worker, decode: Worker, say: Say
) -> dict[str, Any]:
    """The same tokens from stock, patched and disaggregated engines, and the right ones."""
    rng, new = random.Random(0), settings.greedy_new_tokens
    prompts = [random_prompts(rng, shape, 1, tokens)[0] for tokens in settings.greedy_prompts]
    ours = prefill.ask("generate", prompts=prompts, new_tokens=new)
    plain = stock.ask("generate", prompts=prompts, new_tokens=new)
    handed_over = [_handed_over(prefill, decode, prompt, new)["tokens"] for prompt in prompts]
    say("tokens generated; transformers judges them")
    verdict = judge(str(model), settings.device, settings.dtype, list(zip(prompts, ours, strict=True)))
    return {
        "greedy_against_transformers": verdict,
        "patched_equals_stock": _compared(ours, plain),
        "disaggregated_equals_single": _compared(handed_over, ours),
    }


def _handed_over(prefill: Worker, decode: Worker, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    first, source = prefill.ask("prefill", prompt=prompt)
    try:
        return decode.ask("decode", prompt=prompt, first=first, source=source, new_tokens=new_tokens)  # type: ignore[no-any-return]
    finally:
        prefill.ask("release", transfer_id=source.transfer_id)


def _compared(found: list[list[int]], wanted: list[list[int]]) -> dict[str, Any]:
    """`differs` says where: (prompt, token) of each first difference."""
    differs = [
        (n, next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))))
        for n, (a, b) in enumerate(zip(found, wanted, strict=True))
        if a != b
    ]
    return {"sequences": len(wanted), "tokens": sum(map(len, wanted)), "differs": differs, "ok": not differs}


def _transfer(settings: Settings, shape: Shape, prefill: Worker, decode: Worker, say: Say) -> dict[str, Any]:
    """KV of one long prompt from engine to engine through the TCP byte path, digests on; the first pull warms up."""
    rng, runs = random.Random(1), []
    for _ in range(settings.rounds + 1):
        (prompt,) = random_prompts(rng, shape, 1, settings.transfer_tokens)
        runs.append(_handed_over(prefill, decode, prompt, 2))
    rates = [run["bytes"] / run["seconds"] / 1e9 for run in runs[1:]]
    say(f"transfer: {statistics.median(rates):.2f} GB/s")
    return {
        "prompt_tokens": settings.transfer_tokens,
        "bytes": runs[0]["bytes"],
        "gb_per_s": statistics.median(rates),
        "samples": rates,
    }


def _speed(settings: Settings, shape: Shape, stock: Worker, patched: Worker, say: Say) -> dict[str, Any]:
    """Stock and patched engine turn by turn, so that a device that warms up is warm for both."""
    samples: dict[str, dict[str, list[float]]] = {STOCK: {}, PATCHED: {}}
    for turn in range(settings.rounds + 1):
        rng = random.Random(2 + turn)
        prefill = random_prompts(rng, shape, settings.prefill_prompts, settings.prefill_tokens)
        decode = {n: random_prompts(rng, shape, n, settings.decode_prompt_tokens) for n in settings.batches}
        order = (stock, patched) if turn % 2 else (patched, stock)
        for worker in order:
            seconds = worker.ask("prefill_seconds", prompts=prefill)
            measured = {"prefill_tokens_per_s": len(prefill) * settings.prefill_tokens / seconds}
            for batch, prompts in decode.items():
                gaps = worker.ask("tpot_ms", prompts=prompts, new_tokens=settings.decode_new_tokens)
                measured[f"tpot_ms_batch_{batch}"] = statistics.median(gaps)
            if turn:  # the first one compiles
                for metric, value in measured.items():
                    samples[worker.name].setdefault(metric, []).append(value)
        say(f"speed: round {turn} of {settings.rounds}{'' if turn else ', warming up'}")
    return {
        metric: _against(metric, samples[STOCK][metric], samples[PATCHED][metric], settings.tolerance)
        for metric in samples[STOCK]
    }


def _against(metric: str, stock: list[float], patched: list[float], tolerance: float) -> dict[str, Any]:
    """`slower` is by how much the patched engine is, of the medians of the turns' ratios; negative: it is faster."""
    ratios = [b / a if metric.startswith("tpot") else a / b for a, b in zip(stock, patched, strict=True)]
    slower = statistics.median(ratios) - 1
    return {
        STOCK: statistics.median(stock),
        PATCHED: statistics.median(patched),
        "slower": slower,
        "ok": slower <= tolerance,
        "samples": {STOCK: stock, PATCHED: patched},
    }


def utilisation(settings: Settings, shape: Shape, tokens_per_s: float, gpu: str, matmul_flops: float) -> dict[str, Any]:
    """MFU: what prefill needs at least, over what the device could do in that time.

    Of the vendor's peak, where the device is known, and of what a plain matrix product reaches here.
    """
    achieved = shape.prefill_flops(settings.prefill_tokens) / settings.prefill_tokens * tokens_per_s
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    return {
        "flops_per_s": achieved,
        "mfu": achieved / peak if peak else None,
        "peak_flops_per_s": peak,
        "of_a_matrix_product": achieved / matmul_flops,
    }


def matmul_flops(settings: Settings) -> float:
    """FLOP/s of a square product in the model's dtype, random values: best of ten."""
    import torch

    size, dtype = settings.matmul_size, getattr(torch, settings.dtype)
    a, b = (torch.randn(size, size, device=settings.device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    seconds = []
    for _ in range(13):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds[3:])


def describe(settings: Settings) -> dict[str, Any]:
    return asdict(settings)
