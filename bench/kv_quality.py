"""What each kind of KV costs in accuracy, against KV in fp32: `python -m bench.kv_quality`.

SmolLM2 reads a passage (bench/data/passage.txt) teacher-forced, token by token, through the engine's decode path, so
that each distribution comes from KV as it was stored. bf16 runs the whole model in bfloat16, for KV that is not
quantised has the dtype of the model.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from bench.serving import table
from sagellm_common.client.text import Tokenizer
from sagellm_common.core.config import Config
from sagellm_common.core.types import SamplingParams, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import EngineRequest, SequenceOutput
from services.cli.models import prepare_smollm2

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "kv_quant_bits": 8},
    "int4": {"dtype": "float32", "kv_quant_bits": 4},
}
PASSAGE = Path(__file__).parent / "data" / "passage.txt"
PROMPT_TOKENS = 16
"""Read at once, before the first distribution is taken."""

LogProbs = NDArray[np.float32]
"""[position, vocabulary]"""


@dataclass(frozen=True, slots=True)
class Quality:
    kv_bytes_per_token: int
    kl_mean: float
    kl_p99: float
    argmax_agreement: float
    perplexity: float


async def read(model: Path, kind: dict[str, Any], tokens: list[int]) -> tuple[LogProbs, int]:
    """Log-probabilities of the token after tokens[: PROMPT_TOKENS], … , tokens[:-1]; and the KV bytes of one token."""
    engine = make_engine(
        Config.model_validate({"model": {"path": str(model)}, "engine": {"prefix_caching": False, **kind}})
    )
    found: list[LogProbs] = []
    ended: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()

    def on_step(outputs: Any) -> None:
        for output in outputs:
            if output.finish_reason:
                ended.set_result(output)

    await engine.start(on_step)
    with forced(tokens[PROMPT_TOKENS:], found):
        count = len(tokens) - PROMPT_TOKENS
        sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
        engine.submit(EngineRequest("passage", as_token_ids(tokens[:PROMPT_TOKENS]), sampling))
        output = await ended
    layout = engine.kv.layout
    await engine.close()
    if output.error is not None:
        raise output.error
    return np.stack(found), layout.block_bytes // layout.block_size_tokens


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


async def measure(max_tokens: int) -> dict[str, Any]:
    model = prepare_smollm2()
    tokens = Tokenizer.from_dir(model).encode(PASSAGE.read_text(encoding="utf-8")).tolist()[:max_tokens]
    reference: LogProbs | None = None
    results: dict[str, Quality] = {}
    for name, kind in KINDS.items():
        found, kv_bytes = await read(model, kind, tokens)
        reference = found if reference is None else reference
        results[name] = compare(reference, found, tokens[PROMPT_TOKENS:], kv_bytes)
        print(f"{name}: {results[name]}", flush=True)
    rows = [["KV", "bytes/token", "KL mean", "KL p99", "argmax", "perplexity"]]
    rows += [
        [
            name,
            str(q.kv_bytes_per_token),
            f"{q.kl_mean:.2e}",
            f"{q.kl_p99:.2e}",
            f"{100 * q.argmax_agreement:.1f} %",
            f"{q.perplexity:.3f}",
        ]
        for name, q in results.items()
    ]
    print(f"\nSmolLM2-135M, {len(tokens) - PROMPT_TOKENS} positions\n{table(rows)}")
    return {
        "conditions": {
            "model": model.name,
            "positions": len(tokens) - PROMPT_TOKENS,
            "passage": PASSAGE.name,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "kinds": {name: asdict(quality) for name, quality in results.items()},
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
