"""What each kind of KV costs in accuracy, against KV in fp32: `python -m bench.kv_quality`.

SmolLM2 reads a passage (bench/data/passage.txt) teacher-forced, token by token, through the engine's decode path, so
that each distribution comes from KV as it was stored. bf16 runs the whole model in bfloat16, for KV that is not
quantised has the dtype of the model.

Then handoffs, over the passage's second half: an engine reads the first half at once, its KV is converted as between
two pools of these dtypes, or as `transport.wire_dtype` has it sent, and another engine reads on from there.

    KL          Σ p_fp32 · ln(p_fp32 / p) over the vocabulary, mean and 99th percentile over positions, nats
    argmax      share of positions whose most probable token is that of fp32
    perplexity  exp of the mean negative log-probability of the passage's own tokens
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from bench.serving import table
from sagellm_common.client.text import Tokenizer
from sagellm_common.comm_backend.kv_dtypes import Deviation, parse
from sagellm_common.comm_backend.transcode import Transcoder, with_dtype
from sagellm_common.core.config import Config
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput
from services.cli.models import prepare_smollm2

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "kv_quant_bits": 8},
    "int4": {"dtype": "float32", "kv_quant_bits": 4},
}
HANDOFFS: dict[str, tuple[str, str, str]] = {
    "fp32 alone": ("fp32", "", "fp32"),
    "int8 alone": ("int8", "", "int8"),
    "fp32 to int8": ("fp32", "", "int8"),
    "int8 to fp32": ("int8", "", "fp32"),
    "fp32 to int4": ("fp32", "", "int4"),
    "fp32, sent as bf16": ("fp32", "bfloat16", "fp32"),
    "fp32, sent as fp8": ("fp32", "float8_e4m3fn", "fp32"),
    "fp32, sent as int8": ("fp32", "int8/float32", "fp32"),
    "fp32, sent as int4": ("fp32", "int4/float32", "fp32"),
}
"""prefill's kind, the dtype on the wire (empty: as the pools have it), decode's kind. Between equal pools nothing is
converted: the same as one engine alone."""
PASSAGE = Path(__file__).parent / "data" / "passage.txt"
PROMPT_TOKENS = 16
"""Read at once, before the first distribution is taken."""

LogProbs = NDArray[np.float32]
"""[position, vocabulary]"""


@dataclass(frozen=True, slots=True)
class Run:
    engine: Engine
    request: Callable[[EngineRequest], Awaitable[SequenceOutput]]


@dataclass(frozen=True, slots=True)
class Quality:
    kv_bytes_per_token: int
    kl_mean: float
    kl_p99: float
    argmax_agreement: float
    perplexity: float
    relative_rms: float | None = None
    """Of the KV that arrived, in a handoff."""


@asynccontextmanager
async def running(model: Path, kind: dict[str, Any]) -> AsyncIterator[Run]:
    """An engine, and how to have it do one request."""
    engine = make_engine(
        Config.model_validate({"model": {"path": str(model)}, "engine": {"prefix_caching": False, **kind}})
    )
    ended: asyncio.Queue[SequenceOutput] = asyncio.Queue()

    def on_step(outputs: Any) -> None:
        for output in outputs:
            if output.finish_reason:
                ended.put_nowait(output)

    async def run(request: EngineRequest) -> SequenceOutput:
        engine.submit(request)
        output = await ended.get()
        if output.error is not None:
            raise output.error
        return output

    await engine.start(on_step)
    try:
        yield Run(engine, run)
    finally:
        await engine.close()


async def read(model: Path, kind: dict[str, Any], tokens: list[int]) -> tuple[LogProbs, int]:
    """Log-probabilities of the token after tokens[: PROMPT_TOKENS], … , tokens[:-1]; and the KV bytes of one token."""
    found: list[LogProbs] = []
    async with running(model, kind) as one:
        with forced(tokens[PROMPT_TOKENS:], found):
            sampling = SamplingParams(max_new_tokens=len(tokens) - PROMPT_TOKENS, ignore_eos=True)
            await one.request(EngineRequest("passage", as_token_ids(tokens[:PROMPT_TOKENS]), sampling))
        layout = one.engine.kv.layout
    return np.stack(found), layout.block_bytes // layout.block_size_tokens


async def read_on(model: Path, tokens: list[int], prefill: str, wire: str, decode: str) -> tuple[LogProbs, int, float]:
    """Log-probabilities of the token after tokens[: half + 1], …, tokens[:-1], of a decode engine that was handed over
    the KV of the first half; the bytes that cross of one token, and the relative RMS error of what arrived."""
    half = len(tokens) // 2
    async with running(model, KINDS[prefill]) as one:
        sampling = SamplingParams(max_new_tokens=1, ignore_eos=True)
        done = await one.request(EngineRequest("half", as_token_ids(tokens[:half]), sampling, hold_blocks=True))
        assert done.held is not None
        crossing, layout = one.engine.kv.layout, one.engine.kv.layout
        with one.engine.kv.regions().reading(done.held.block_ids) as (region, ids):
            data = b"".join(bytes(region.block(int(n))) for n in ids)
        one.engine.kv.free(done.held)
    region = KvRegion(memoryview(bytearray(data)), layout.block_bytes, len(ids))
    ids, deviation = np.arange(len(ids), dtype=np.int32), Deviation()
    if wire:
        dtype = parse(wire)
        assert dtype is not None
        crossing = with_dtype(layout, dtype)
        sent = KvRegion(memoryview(bytearray(crossing.block_bytes * len(ids))), crossing.block_bytes, len(ids))
        deviation = Transcoder(layout, crossing).move(region, ids, sent, ids, range(half))
        region = sent
    found: list[LogProbs] = []
    async with running(model, KINDS[decode]) as other:
        target = other.engine.kv.allocate(as_token_ids(tokens[:half]), half)
        with other.engine.kv.regions().writing(target.block_ids) as (pool, to):
            moved = Transcoder(crossing, other.engine.kv.layout).move(region, ids, pool, to, range(half))
        target.num_cached_tokens = half
        with forced(tokens[half + 1 :], found):
            sampling = SamplingParams(max_new_tokens=len(tokens) - half, ignore_eos=True)
            prompt = as_token_ids(tokens[: half + 1])
            await other.request(EngineRequest("rest", prompt, sampling, allocation=target, num_emitted_tokens=1))
        smaller = min(crossing.block_bytes, other.engine.kv.layout.block_bytes)
    return np.stack(found), smaller // crossing.block_size_tokens, deviation.then(moved).relative_rms


@contextmanager
def forced(tokens: list[int], found: list[LogProbs]) -> Iterator[None]:
    """Whatever the model would say, it says `tokens`; `found` gets its log-probabilities for each."""
    import torch

    from sagellm_common.engines.lmdeploy.sampling import RowwiseLogitsProcessor

    left = iter(tokens)

    def sampling(_: RowwiseLogitsProcessor, logits: torch.Tensor) -> torch.Tensor:
        (row,) = logits.float().log_softmax(-1)
        found.append(row.numpy().copy())
        return torch.tensor([next(left)])

    with mock.patch.object(RowwiseLogitsProcessor, "sampling", sampling):
        yield


def compare(reference: LogProbs, found: LogProbs, said: list[int], kv_bytes_per_token: int) -> Quality:
    """`said` are the passage's tokens at these positions."""
    p, q = reference.astype(np.float64), found.astype(np.float64)
    kl = np.sum(np.exp(p) * (p - q), axis=1)
    return Quality(
        kv_bytes_per_token=kv_bytes_per_token,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        argmax_agreement=float(np.mean(p.argmax(1) == q.argmax(1))),
        perplexity=float(np.exp(-q[np.arange(len(said)), said].mean())),
    )


async def alone(model: Path, tokens: list[int]) -> dict[str, Quality]:
    reference: LogProbs | None = None
    results: dict[str, Quality] = {}
    for name, kind in KINDS.items():
        found, kv_bytes = await read(model, kind, tokens)
        reference = found if reference is None else reference
        results[name] = compare(reference, found, tokens[PROMPT_TOKENS:], kv_bytes)
        print(f"{name}: {results[name]}", flush=True)
    return results


async def handed_over(model: Path, tokens: list[int]) -> dict[str, Quality]:
    reference: LogProbs | None = None
    results: dict[str, Quality] = {}
    for name, way in HANDOFFS.items():
        found, kv_bytes, relative_rms = await read_on(model, tokens, *way)
        reference = found if reference is None else reference
        said = tokens[len(tokens) - len(found) :]
        results[name] = replace(compare(reference, found, said, kv_bytes), relative_rms=relative_rms)
        print(f"{name}: {results[name]}", flush=True)
    return results


def rows(results: dict[str, Quality]) -> list[list[str]]:
    header = ["KV", "bytes/token", "KL mean", "KL p99", "argmax", "perplexity", "KV RMS error"]
    return [header] + [
        [
            name,
            str(q.kv_bytes_per_token),
            f"{q.kl_mean:.2e}",
            f"{q.kl_p99:.2e}",
            f"{100 * q.argmax_agreement:.1f} %",
            f"{q.perplexity:.3f}",
            "" if q.relative_rms is None else f"{q.relative_rms:.1e}",
        ]
        for name, q in results.items()
    ]


async def measure(max_tokens: int) -> dict[str, Any]:
    model = prepare_smollm2()
    tokens = Tokenizer.from_dir(model).encode(PASSAGE.read_text(encoding="utf-8")).tolist()[:max_tokens]
    kinds, handoffs = await alone(model, tokens), await handed_over(model, tokens)
    positions = len(tokens) - PROMPT_TOKENS
    print(f"\nSmolLM2-135M, {positions} positions\n{table(rows(kinds))}")
    print(f"\nhanded over in the middle\n{table(rows(handoffs))}")
    return {
        "conditions": {
            "model": model.name,
            "positions": positions,
            "passage": PASSAGE.name,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "kinds": {name: asdict(quality) for name, quality in kinds.items()},
        "handoffs": {name: asdict(quality) for name, quality in handoffs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=1000, help="read no more of the passage")
    parser.add_argument("--out", default="bench/results/kv_quality.json")
    args = parser.parse_args()
    if args.max_tokens < PROMPT_TOKENS + 1:
        parser.error(f"--max-tokens {args.max_tokens}: must be at least {PROMPT_TOKENS + 1}")
    result = asyncio.run(measure(args.max_tokens))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
